"""The choice of every token, made once for both requests of a text; the engine is left with nothing to choose."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import structlog
import torch
from torch import Tensor

from soundstage_lm.grammar import Grammar
from soundstage_lm.sampling import choose, guide
from soundstage_lm.vllm_engine.ticket import Ticket
from soundstage_lm.writer import Constraint, TokenSet

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the step's logits; `num_written` tokens follow its prompt, fewer than 0 while the prompt is read."""

    index: int
    ticket: Ticket
    num_written: int


class Forcing:
    """All texts of an engine, by name."""

    def __init__(self, grammar: Grammar, *, halt: int) -> None:
        """`halt` is a token that no rule allows: it ends both requests of a text that has lost its way."""
        self._grammar, self._halt = grammar, halt
        self._texts: dict[str, _Text] = {}
        self._columns = _Columns()

    def begin(self, ticket: Ticket, written: Sequence[int] = ()) -> None:
        """Take a text in, with what was written before it was last put aside; its second request changes nothing."""
        if ticket.text not in self._texts:
            text = _Text(ticket, self._grammar.begin(ticket.rule), self._columns)
            for token in written:
                text.take(token)
            self._texts[ticket.text] = text

    def keep(self, names: set[str]) -> None:
        """Forget all texts but these."""
        for name in self._texts.keys() - names:
            del self._texts[name]

    def force(self, logits: Tensor, rows: Iterable[Row]) -> None:
        """Leave every row of logits [rows, vocabulary] a single token, the same in both rows of a text."""
        texts: dict[str, list[Row]] = {}
        for row in rows:
            texts.setdefault(row.ticket.text, []).append(row)
        for name, members in texts.items():
            if all(row.num_written < 0 for row in members):
                continue  # the engine throws these rows away
            token = self._next(name, sorted(members, key=lambda row: row.ticket.role), logits)
            for row in members:
                logits[row.index] = float("-inf")
                logits[row.index, token] = 0.0

    def _next(self, name: str, members: Sequence[Row], logits: Tensor) -> int:
        text, counts = self._texts.get(name), [row.num_written for row in members]
        if text is None or counts != [text.num_written] * members[0].ticket.num_members:
            _log.error("text_out_of_step", text=name, written=counts)
            return self._halt
        token = text.choose([logits[row.index] for row in members])
        if token is None:
            _log.error("text_without_a_next_token", text=name, written=counts)
            return self._halt
        text.take(token)
        return token


class _Text:
    def __init__(self, ticket: Ticket, constraint: Constraint, columns: "_Columns") -> None:
        self._ticket, self._constraint, self._columns = ticket, constraint, columns
        self._tokens: list[int] = []

    @property
    def num_written(self) -> int:
        return len(self._tokens)

    def take(self, token: int) -> None:
        self._tokens.append(token)
        self._constraint.advance(token)

    def choose(self, rows: Sequence[Tensor]) -> int | None:
        """Choose from rows [vocabulary], the conditional one first; None when nothing can follow."""
        allowed = self._constraint.allowed
        if allowed is None:
            return None
        if len(allowed) == 1:
            return int(allowed.ids[0])
        sampling = self._ticket.sampling
        scores = [self._columns.take(row, allowed) for row in rows]
        chosen = guide(scores[0], scores[1], sampling.guidance_scale) if len(scores) > 1 else scores[0].float()
        return choose(
            chosen,
            allowed,
            written=self._tokens,
            sampling=sampling,
            seed=self._ticket.seed,
            phase=self._ticket.phase,
        )


class _Columns:
    """Which columns of the logits a token set stands for: a slice where they lie together, else indices."""

    def __init__(self) -> None:
        self._known: Final[WeakKeyDictionary[TokenSet, slice | Tensor]] = WeakKeyDictionary()

    def take(self, row: Tensor, allowed: TokenSet) -> Tensor:
        if allowed not in self._known:
            ids = allowed.ids
            first, last = int(ids[0]), int(ids[-1])
            together = last - first + 1 == len(ids)
            self._known[allowed] = slice(first, last + 1) if together else torch.from_numpy(ids).to(row.device)
        return row[self._known[allowed]]
