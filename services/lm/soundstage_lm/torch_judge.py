"""The PyTorch engine as a judge: it reads a text in pieces and looks up each token that comes next."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import torch

from soundstage_lm.model.cache import KvCache, Span
from soundstage_lm.model.pages import count_pages
from soundstage_lm.scoring import Judged
from soundstage_lm.weights import Checkpoint
from soundstage_runtime.errors import InvalidRequestError, ServiceError, Violation
from soundstage_runtime.worker import Worker

_PIECE: Final = 128  # tokens: the logits of so many are a tenth of a gigabyte


class JudgeError(ServiceError):
    """The network's numbers make no sense."""

    reason = "JUDGE_FAILED"


class TorchJudge:
    """Judges with a network in this process, between the steps of texts being written, one call at a time.

    Its keys and values are beside those of the texts, and last as long as the call.
    """

    def __init__(self, checkpoint: Checkpoint, worker: Worker, *, max_tokens: int | None = None) -> None:
        """Judge texts of up to `max_tokens`, prompts included; None for as many as the model knows places."""
        self._model, self._worker = checkpoint.model, worker
        self._max_tokens = max_tokens or checkpoint.model.config.max_position_embeddings
        self._turn = asyncio.Lock()

    async def judge(self, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[Judged]:
        """Judge targets; see Judge. Raises JudgeError, and InvalidRequestError where memory is too small for them."""
        *before, last = prompt
        longest = len(prompt) + max(map(len, targets))
        if longest > self._max_tokens:
            wanted = f"make {longest} tokens with the words; the planner's memory has room for {self._max_tokens}"
            raise InvalidRequestError([Violation(field="codes", description=wanted)])
        async with self._turn:
            cache = await self._worker.run(self._make_cache, longest)
            for first, tokens in _cut(before):
                await self._worker.run(self._read, cache, tokens, first)
            return [await self._judge(cache, len(before), last, target) for target in targets]

    async def _judge(self, cache: KvCache, start: int, last: int, target: Sequence[int]) -> Judged:
        """Judge a target after a prompt that is read but for its last token, over what an earlier target left."""
        pieces = [
            await self._worker.run(self._look_up, cache, tokens, start + first, target[first : first + len(tokens)])
            for first, tokens in _cut([last, *target[:-1]])
        ]
        log_probabilities, ranks = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        if not np.isfinite(log_probabilities).all():
            raise JudgeError("the planner's logits are not numbers; another dtype may help")
        return Judged(log_probabilities=log_probabilities, ranks=ranks)

    @torch.inference_mode()
    def _make_cache(self, tokens: int) -> KvCache:
        cache = self._model.make_cache(count_pages(tokens))
        cache.clear(range(count_pages(tokens)))
        return cache

    @torch.inference_mode()
    def _read(self, cache: KvCache, tokens: Sequence[int], start: int) -> None:
        self._model.read(cache, [_span(tokens, start)])

    @torch.inference_mode()
    def _look_up(
        self, cache: KvCache, tokens: Sequence[int], start: int, following: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        hidden = self._model.read_all(cache, _span(tokens, start))
        logits = (hidden @ self._model.embed_tokens.weight.T).float()
        wanted = torch.tensor(following, device=logits.device)[:, None]
        ranks = 1 + (logits > logits.gather(1, wanted)).sum(dim=1)
        return logits.log_softmax(dim=1).gather(1, wanted)[:, 0].cpu().numpy(), ranks.cpu().numpy()


def _cut(tokens: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Part tokens into pieces, each with the place of its first."""
    for first in range(0, len(tokens), _PIECE):
        yield first, tokens[first : first + _PIECE]


def _span(tokens: Sequence[int], start: int) -> Span:
    return Span(tokens=tuple(tokens), start=start, pages=tuple(range(count_pages(start + len(tokens)))))
