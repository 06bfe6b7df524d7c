"""Logits of the tokens that are allowed, and of no others."""

from collections.abc import Callable
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from soundstage_device.products import multiply, pack
from soundstage_lm.writer import TokenSet

_WORTH_PACKING: Final = 1024  # tokens


class Head:
    """Scores sets of tokens with the embedding [vocabulary, hidden]; what belongs to a set is kept as long as it is."""

    def __init__(self, embedding: Tensor) -> None:
        self._embedding = embedding
        self._scorers: WeakKeyDictionary[TokenSet, Callable[[Tensor], Tensor]] = WeakKeyDictionary()

    def score(self, hidden: Tensor, allowed: TokenSet) -> Tensor:
        """Return float32 logits [rows, allowed] of hidden states [rows, hidden]."""
        if allowed not in self._scorers:
            self._scorers[allowed] = self._make_scorer(allowed)
        return self._scorers[allowed](hidden).float()

    def _make_scorer(self, allowed: TokenSet) -> Callable[[Tensor], Tensor]:
        first, last = int(allowed.ids[0]), int(allowed.ids[-1])
        span = last + 1 - first
        if span > 2 * len(allowed):
            return _project(self._embedding[torch.from_numpy(allowed.ids).to(self._embedding.device)])
        # Most of the tokens between the first and the last are allowed: no copy, and few logits too many.
        project = _project(self._embedding[first : last + 1])
        if span == len(allowed):
            return project
        indices = torch.from_numpy(np.subtract(allowed.ids, first)).to(self._embedding.device)
        return lambda hidden: project(hidden)[:, indices]


def _project(rows: Tensor) -> Callable[[Tensor], Tensor]:
    packed = pack(rows) if rows.device.type == "cpu" and len(rows) >= _WORTH_PACKING else None
    return (lambda hidden: F.linear(hidden, rows)) if packed is None else (lambda hidden: multiply(hidden, packed))
