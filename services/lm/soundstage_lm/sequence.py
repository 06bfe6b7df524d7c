"""One text being decoded: its rows in the cache, and what it has drawn so far."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundstage_lm.brief import Sampling
from soundstage_lm.model.qwen3 import Qwen3
from soundstage_lm.sampling import draw, guide, penalize, uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The tokens that may come next, and the rows of the head that score them."""

    ids: NDArray[np.int64]  # [candidates]
    head: Tensor  # [candidates, hidden]


class GuidedSequence:
    """A conditional row and, where there is guidance, an unconditional one; both are fed the same tokens."""

    def __init__(self, model: Qwen3, *, rows: int, sampling: Sampling, seed: int, phase: int) -> None:
        self._model, self._sampling = model, sampling
        self._seed, self._phase = seed, phase
        self._cache = model.make_cache(rows)
        self._hidden: list[Tensor] = []  # of each row's last token, [hidden]
        self._pending: int | None = None
        self.tokens: list[int] = []

    def read(self, prompt: Sequence[int]) -> None:
        """Read the next row's prompt, the conditional one first."""
        self._hidden.append(self._model.prefill(self._cache, len(self._hidden), prompt))

    def write(self, candidates: Candidates) -> int:
        """Draw the next token; returns its index among the candidates."""
        # The token before is read only now: the last one of a text never is.
        if self._pending is not None:
            rows = len(self._hidden)
            self._hidden = list(self._model.step(self._cache, [self._pending] * rows))
        index = self._choose(candidates) if len(candidates.ids) > 1 else 0
        self._pending = int(candidates.ids[index])
        self.tokens.append(self._pending)
        return index

    def _choose(self, candidates: Candidates) -> int:
        logits = (torch.stack(self._hidden) @ candidates.head.T).float()
        chosen = guide(logits[0], logits[1], self._sampling.guidance_scale) if len(logits) > 1 else logits[0]
        if self._sampling.repetition_penalty != 1:
            is_written = torch.from_numpy(np.isin(candidates.ids, self.tokens)).to(chosen.device)
            chosen = penalize(chosen, is_written, self._sampling.repetition_penalty)
        return draw(chosen, self._sampling, uniform(self._seed, self._phase, len(self.tokens)))
