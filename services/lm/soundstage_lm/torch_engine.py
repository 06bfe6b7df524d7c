"""The PyTorch engine: one step of the network serves all texts that are being written just then.

A step reads one token for every row of every text that has its prompts behind it, and beside them a piece of the
prompts that came since. So a new text joins at the next step, a long prompt does not hold up the others, and a text
that is closed takes part in no further step. Where a step has no memory its texts take it in parts, down to a token by
itself, and only one that has none for that ends.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, Protocol

import structlog
import torch
from torch import Tensor

from soundstage_device.shortage import is_out_of_memory
from soundstage_device.worker import DeviceMemoryError
from soundstage_lm.model.cache import Span
from soundstage_lm.model.head import Head
from soundstage_lm.model.pages import PAGE, PagePool, Row, count_pages
from soundstage_lm.rules import Rule
from soundstage_lm.sampling import choose, guide
from soundstage_lm.weights import Checkpoint
from soundstage_lm.writer import Constraint, Text, TokenSet
from soundstage_runtime.errors import InvalidRequestError, ServiceError, Violation
from soundstage_runtime.worker import Worker

_log = structlog.get_logger()

_PIECE: Final = 128  # tokens of prompts in one step: a CPU reads them in about the time of three steps
_CUDA_PIECE: Final = 1024
_LEAST_PIECE: Final = 64
_GROWTH: Final = 64  # after a step that ran out of memory each piece may be larger than the last by so small a part
_MOST_MOVES: Final = 2  # pages moved in one step: each costs a small part of it

_NO_NUMBERS: Final = "the planner's logits are not numbers; another dtype may help"
_NO_MEMORY: Final = "the device has no memory left for this text just now; shorter words or fewer songs need less"


class WriteError(ServiceError):
    """A text cannot go on; the others are not touched."""

    reason = "WRITE_FAILED"


@dataclass(slots=True, kw_only=True, eq=False)
class _Branch(Row):
    """One prompt and what was written after it."""

    unread: list[int]
    length: int = 0  # tokens read
    hidden: Tensor | None = None  # of the last token read, [hidden]; None where there was no memory to read it


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """A text being written."""

    text: Text
    constraint: Constraint
    branches: list[_Branch]
    num_reserved: int  # pages
    written: list[int] = field(default_factory=list[int])
    # One entry a token, so their number bounds it; None ends the text.
    out: asyncio.Queue[int | ServiceError | None] = field(default_factory=asyncio.Queue[int | ServiceError | None])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """Tokens of a branch to be read in a step."""

    entry: _Entry
    branch: _Branch
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """A token to be drawn at the end of a step."""

    entry: _Entry
    allowed: TokenSet
    written: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What one step does: fixed before it begins, so that texts may leave while it runs."""

    moves: Sequence[tuple[int, int]]
    fresh: Sequence[int]
    reads: Sequence[_Read]
    draws: Sequence[_Draw]


class Rules(Protocol):
    """Begins a text under its rule."""

    def begin(self, rule: Rule) -> Constraint: ...


class TorchWriter:
    """Writes texts with a network in this process, within `kv_cache_gb` of keys and values."""

    def __init__(self, checkpoint: Checkpoint, worker: Worker, grammar: Rules, *, kv_cache_gb: float = 1.0) -> None:
        self._model, self._worker, self._grammar = checkpoint.model, worker, grammar
        self._device = checkpoint.model.embed_tokens.weight.device
        self._head = Head(checkpoint.model.embed_tokens.weight)
        self._pool = PagePool(int(kv_cache_gb * 1e9) // checkpoint.model.page_bytes)
        self._cache = checkpoint.model.make_cache(self._pool.num_pages)
        self._piece = self._most_piece = _PIECE if self._device.type == "cpu" else _CUDA_PIECE
        self._waiting: deque[_Entry] = deque()
        self._live: list[_Entry] = []
        self._steps: asyncio.Task[None] | None = None

    @property
    def num_live(self) -> int:
        """How many texts hold memory in the engine."""
        return len(self._live)

    @property
    def num_pages_used(self) -> int:
        """How many pages of the cache hold tokens."""
        return self._pool.num_used

    async def write(self, text: Text) -> AsyncGenerator[int, None]:
        """Yield the tokens of a text as they are drawn; see Writer. A text that does not fit beside others waits.

        Raises InvalidRequestError when it could never fit, WriteError when the network's numbers make no sense, and
        DeviceMemoryError when the device has no memory left for it.
        """
        entry = self._begin(text)
        try:
            if entry.constraint.allowed is not None:
                self._waiting.append(entry)
                if self._steps is None:
                    # In a context of its own: the steps belong to no single call.
                    self._steps = asyncio.create_task(self._run_steps(), context=contextvars.Context())
            while (token := await entry.out.get()) is not None:
                if isinstance(token, ServiceError):
                    raise token
                yield token
        finally:
            self._leave(entry)

    def _begin(self, text: Text) -> _Entry:
        lengths = [len(prompt) + text.rule.max_tokens for prompt in text.prompts]
        reserved = sum(map(count_pages, lengths))
        limit = self._model.config.max_position_embeddings
        if max(lengths) > limit or reserved > self._pool.num_pages:
            sizes = " and ".join(str(len(prompt)) for prompt in text.prompts)
            wanted = (
                f"make prompts of {sizes} tokens, and up to {text.rule.max_tokens} follow each; the model has room for "
                f"{limit}, the cache for {self._pool.num_pages * PAGE} in all"
            )
            raise InvalidRequestError([Violation(field="lyrics", description=wanted)])
        entry = _Entry(
            text=text,
            constraint=self._grammar.begin(text.rule),
            branches=[_Branch(unread=list(prompt)) for prompt in text.prompts],
            num_reserved=reserved,
        )
        self._force(entry)
        return entry

    def _go_on(self, entry: _Entry, token: int | ServiceError) -> None:
        """Write the token drawn, and those that follow from it; or end the text with what came of its step."""
        if isinstance(token, ServiceError):
            self._end(entry, token)
            return
        try:
            self._write(entry, token)
            self._force(entry)
        except Exception as error:  # of this text's rule, and no matter of the other texts
            _log.exception("rule_failed")
            self._end(entry, WriteError(f"the rule of the text failed: {type(error).__name__}"))

    def _write(self, entry: _Entry, token: int) -> None:
        entry.constraint.advance(token)
        entry.written.append(token)
        entry.out.put_nowait(token)
        for branch in entry.branches:
            branch.unread.append(token)

    def _force(self, entry: _Entry) -> None:
        """Write the tokens that have no alternative: the network reads them together, and is not asked."""
        while (allowed := entry.constraint.allowed) is not None and len(allowed) == 1:
            self._write(entry, int(allowed.ids[0]))
        if allowed is None:
            self._end(entry, None)
        elif len(entry.written) >= entry.text.rule.max_tokens:
            self._end(entry, WriteError(f"the text is longer than the {len(entry.written)} tokens of its rule"))

    def _end(self, entry: _Entry, why: ServiceError | None) -> None:
        self._leave(entry)
        entry.out.put_nowait(why)

    def _end_all(self, why: ServiceError) -> None:
        for entry in list(self._live):
            self._end(entry, why)

    def _leave(self, entry: _Entry) -> None:
        if entry in self._waiting:
            self._waiting.remove(entry)
        if entry in self._live:
            self._live.remove(entry)
            for branch in entry.branches:
                self._pool.release(branch)

    async def _run_steps(self) -> None:
        try:
            while self._admit():
                try:
                    outcomes = await self._worker.run(self._take, self._plan())
                except ServiceError as error:  # the device has no memory left even for the draws, say
                    self._end_all(error)
                except Exception as error:
                    _log.exception("step_failed", texts=len(self._live))
                    self._end_all(WriteError(f"a step of the planner failed: {type(error).__name__}"))
                else:
                    for entry, token in outcomes.items():
                        if entry in self._live:
                            self._go_on(entry, token)
        finally:
            self._steps = None

    def _admit(self) -> bool:
        """Let those in that fit, first come first served; returns whether there is anything to do."""
        room = self._pool.num_pages - sum(entry.num_reserved for entry in self._live)
        while self._waiting and self._waiting[0].num_reserved <= room:
            entry = self._waiting.popleft()
            room -= entry.num_reserved
            self._live.append(entry)
        return bool(self._live)

    def _plan(self) -> _Step:
        """Fix what the next step reads, and take the pages for it."""
        moves = self._pool.compact(_MOST_MOVES)
        unread = [(entry, branch) for entry in self._live for branch in entry.branches if branch.unread]
        chosen = [(entry, branch, 1) for entry, branch in unread if len(branch.unread) == 1]
        room = self._piece = min(self._most_piece, self._piece + 1 + self._piece // _GROWTH)
        for entry, branch in unread:
            count = min(room, len(branch.unread))
            if len(branch.unread) > 1 and count:
                chosen.append((entry, branch, count))
                room -= count
        fresh: list[int] = []
        reads: list[_Read] = []
        for entry, branch, count in chosen:
            fresh += self._pool.grow(branch, branch.length + count)
            tokens, branch.unread = tuple(branch.unread[:count]), branch.unread[count:]
            span = Span(tokens=tokens, start=branch.length, pages=tuple(branch.pages))
            reads.append(_Read(entry=entry, branch=branch, span=span))
            branch.length += count
        draws: list[_Draw] = []
        for entry in self._live:
            if not any(branch.unread for branch in entry.branches):
                allowed = entry.constraint.allowed
                assert allowed is not None
                draws.append(_Draw(entry=entry, allowed=allowed, written=tuple(entry.written)))
        return _Step(moves=moves, fresh=fresh, reads=reads, draws=draws)

    @torch.inference_mode()
    def _take(self, step: _Step) -> dict[_Entry, int | ServiceError]:
        """Take a step; returns the tokens drawn, and why texts cannot go on."""
        self._cache.move(step.moves)
        self._cache.clear(step.fresh)
        outcomes: dict[_Entry, int | ServiceError] = {}
        found = self._read([read.span for read in step.reads])
        for read, hidden in zip(step.reads, found, strict=True):
            read.branch.hidden = hidden
            if hidden is None:
                outcomes[read.entry] = DeviceMemoryError(_NO_MEMORY, retry_after_s=1.0)
        by_set: dict[TokenSet, list[_Draw]] = {}
        for wanted in step.draws:
            if wanted.entry not in outcomes:
                by_set.setdefault(wanted.allowed, []).append(wanted)
        for allowed, draws in by_set.items():
            for wanted, token in zip(draws, self._choose(draws, allowed), strict=True):
                outcomes[wanted.entry] = WriteError(_NO_NUMBERS) if token is None else token
        if not by_set and self._device.type == "cuda":
            # Else the host runs steps ahead of the device, and a cancel comes late.
            torch.cuda.synchronize(self._device)
        return outcomes

    def _read(self, spans: Sequence[Span]) -> list[Tensor | None]:
        """Read spans, in halves where they are too long for the memory; None where not one token can be read."""
        try:
            return list(self._model.read(self._cache, spans))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # The error has been let go, and with it the tensors of its frames.
        torch.cuda.empty_cache()
        tokens = sum(len(span.tokens) for span in spans)
        self._piece = max(_LEAST_PIECE, min(self._piece, tokens) // 2)
        _log.warning("step_ran_out_of_memory", spans=len(spans), tokens=tokens, piece=self._piece)
        if len(spans) > 1:
            half = len(spans) // 2
            return [*self._read(spans[:half]), *self._read(spans[half:])]
        if tokens == 1:
            return [None]
        first, last = _halve(spans[0])
        return [None] if self._read([first])[0] is None else self._read([last])

    def _choose(self, draws: Sequence[_Draw], allowed: TokenSet) -> list[int | None]:
        """Draw a token for each of several texts that may go on with the same ones; None where logits are of no use."""
        hidden = [branch.hidden for wanted in draws for branch in wanted.entry.branches]
        logits = self._head.score(torch.stack([row for row in hidden if row is not None]), allowed)
        lasts = [number - 1 for number in accumulate(len(wanted.entry.branches) for wanted in draws)]
        firsts = [last + 1 - len(wanted.entry.branches) for last, wanted in zip(lasts, draws, strict=True)]
        scales = [[wanted.entry.text.sampling.guidance_scale] for wanted in draws]
        guided = guide(logits[firsts], logits[lasts], torch.tensor(scales, device=logits.device)).cpu()
        alone = [index for index, wanted in enumerate(draws) if len(wanted.entry.branches) == 1]
        guided[alone] = logits[[firsts[index] for index in alone]].cpu()
        return [
            choose(
                row,
                allowed,
                written=wanted.written,
                sampling=wanted.entry.text.sampling,
                seed=wanted.entry.text.seed,
                phase=wanted.entry.text.phase,
            )
            for wanted, row in zip(draws, guided, strict=True)
        ]


def _halve(span: Span) -> tuple[Span, Span]:
    """Cut a span of several tokens in two, of which the first has the pages that it and what is before it fill."""
    half = len(span.tokens) // 2
    middle = span.start + half
    first = Span(tokens=span.tokens[:half], start=span.start, pages=span.pages[: count_pages(middle)])
    return first, Span(tokens=span.tokens[half:], start=middle, pages=span.pages)
