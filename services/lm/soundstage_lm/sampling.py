"""How a token is drawn from the logits of those that are allowed.

The order: guidance, mask, repetition penalty, temperature, top-k, top-p, draw. The mask is free: logits are only ever
computed for allowed tokens. A draw takes one uniform number that depends on the seed and the position alone, so a
song's codes do not depend on what else is being served.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundstage_lm.brief import Sampling
from soundstage_lm.writer import TokenSet

_LARGEST: Final = float(np.finfo(np.float32).max)


def uniform(seed: int, phase: int, position: int) -> float:
    """Return the number in [0, 1) of one draw: a word of the Philox counter generator."""
    word = int(np.random.Philox(key=seed, counter=[position, phase, 0, 0]).random_raw())
    return (word >> 11) * 2.0**-53


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Move logits away from the unconditional ones, in float32."""
    away = unconditional.float()
    return away + scale * (conditional.float() - away)


def penalize(logits: Tensor, is_written: Tensor, penalty: float) -> Tensor:
    """Make tokens already written less likely: positive logits divided, negative ones multiplied by `penalty`."""
    return torch.where(is_written, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, sampling: Sampling, number: float) -> int:
    """Draw an index into logits [allowed] by inverse CDF, likeliest first; temperature 0 takes the likeliest.

    A NaN is never drawn, but where nothing is finite: there every allowed token is as good as any other.
    """
    scores: NDArray[np.float32] = logits.float().cpu().numpy()
    if not np.isfinite(scores.max()):
        scores = np.nan_to_num(scores, nan=-np.inf, posinf=_LARGEST, neginf=-np.inf)
        scores = np.zeros_like(scores) if scores.max() == -np.inf else scores
    if sampling.temperature == 0:
        return int(scores.argmax())
    # Sorting bare numbers is several times as fast as sorting indices with them; the index is found again by its score.
    rising = np.sort(scores)
    falling = rising[::-1][: sampling.top_k or None]
    with np.errstate(over="ignore"):  # near temperature 0 all but the likeliest are infinitely far from it
        mass = np.exp((falling.astype(np.float64) - scores.max()) / sampling.temperature).cumsum()
    # The last one kept is the first at which the mass reaches top_p, and no draw may pass it.
    last = min(int(np.searchsorted(mass, sampling.top_p * mass[-1])), len(mass) - 1)
    drawn = min(int(np.searchsorted(mass, number * mass[last], side="right")), last)
    score = falling[drawn]
    num_better = len(rising) - int(np.searchsorted(rising, score, side="right"))
    return int(np.flatnonzero(scores == score)[drawn - num_better])  # of equals the first comes first


def choose(
    logits: Tensor, allowed: TokenSet, *, written: Sequence[int], sampling: Sampling, seed: int, phase: int
) -> int | None:
    """Choose the token after `written` by guided logits [allowed]; None where none of them is finite."""
    # A finite maximum is found quickly; what hides one, a NaN or an infinity, is looked at closely.
    if not math.isfinite(logits.amax()) and not logits.isfinite().any():
        return None
    if allowed.is_greedy:
        sampling = replace(sampling, temperature=0.0)
    if sampling.repetition_penalty != 1:
        is_written = torch.from_numpy(np.isin(allowed.ids, written)).to(logits.device)
        logits = penalize(logits, is_written, sampling.repetition_penalty)
    return int(allowed.ids[draw(logits, sampling, uniform(seed, phase, len(written)))])
