"""How a token is drawn from the logits of those that are allowed.

The order: guidance, mask, repetition penalty, temperature, top-k, top-p, draw. The mask is free: logits are only ever
computed for allowed tokens. A draw takes one uniform number that depends on the seed and the position alone, so a
song's codes do not depend on what else is being served.
"""

import numpy as np
import torch
from torch import Tensor

from soundstage_lm.brief import Sampling


def uniform(seed: int, phase: int, position: int) -> float:
    """Return the number in [0, 1) of one draw: a word of the Philox counter generator."""
    word = int(np.random.Philox(key=seed, counter=[position, phase, 0, 0]).random_raw())
    return (word >> 11) * 2.0**-53


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Move logits away from the unconditional ones, in float32."""
    away = unconditional.float()
    return away + scale * (conditional.float() - away)


def penalize(logits: Tensor, is_written: Tensor, penalty: float) -> Tensor:
    """Make tokens already written less likely: positive logits divided, negative ones multiplied by `penalty`."""
    return torch.where(is_written, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, sampling: Sampling, number: float) -> int:
    """Draw an index into logits [allowed] by inverse CDF, likeliest first; temperature 0 takes the likeliest."""
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)
    if not logits.isfinite().any():
        logits = torch.zeros_like(logits)  # broken arithmetic: every allowed token is as good as any other
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.double() - logits.max()) / sampling.temperature
    ordered, indices = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        ordered = ordered[: sampling.top_k]
    mass = ordered.exp().cumsum(0)
    # The last one kept is the first at which the mass reaches top_p, and no draw may pass it.
    last = torch.searchsorted(mass, sampling.top_p * mass[-1:]).clamp(max=len(mass) - 1)
    drawn = torch.searchsorted(mass, number * mass[last], right=True).minimum(last)
    return int(indices[drawn])
