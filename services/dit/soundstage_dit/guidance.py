"""Guidance: away from what the model makes of no words at all. Tensors are [frames, channels]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from soundstage_dit.sampler import cleaned
from soundstage_dit.song import Guidance, GuidanceMethod

_MOMENTUM: Final = -0.75
_LONGEST_DIFFERENCE: Final = 2.5  # of a channel over time
_PI: Final = 3.14  # the reference's, so that angles end where its own do
_LARGEST_ANGLE: Final = {
    GuidanceMethod.ADG: _PI / 6,
    GuidanceMethod.ADG_NORMED: _PI / 3,
    GuidanceMethod.ADG_UNCLIPPED: math.inf,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The velocities of latents at a time, with words and without; None leaves them unguided."""

    latents: Tensor
    time: float
    conditional: Tensor
    unconditional: Tensor | None


class Guide:
    """Guides one song. What it remembers is APG's momentum, which rests while guidance does."""

    def __init__(self, guidance: Guidance) -> None:
        self._guidance = guidance
        self._momentum: Tensor | None = None

    def applies(self, time: float) -> bool:
        """Say if a step from this time is guided; 1 is noise."""
        return self._guidance.scale > 1 and self._guidance.start <= time <= self._guidance.end

    def guide(self, draws: Sequence[Estimate]) -> list[Tensor]:
        """Return the guided velocities of the draws of one step.

        All draws feel the momentum of the steps before, and it moves on by their mean: their order is no matter.
        """
        pulls = [self._pull(draw) for draw in draws]
        guided = [self._guided(draw, pull) for draw, pull in zip(draws, pulls, strict=True)]
        known = [pull for pull in pulls if pull is not None]
        if known:
            self._momentum = torch.stack(known).mean(0)
        return guided

    def correct(self, estimate: Estimate) -> Tensor:
        """Return the guided velocity of a second look at a step: plain CFG for APG, whose momentum counts steps."""
        return self._guided(estimate, None)

    def _pull(self, draw: Estimate) -> Tensor | None:
        if draw.unconditional is None or self._guidance.method is not GuidanceMethod.APG:
            return None
        difference = draw.conditional - draw.unconditional
        return difference if self._momentum is None else difference + _MOMENTUM * self._momentum

    def _guided(self, draw: Estimate, pull: Tensor | None) -> Tensor:
        scale, method = self._guidance.scale, self._guidance.method
        if draw.unconditional is None:
            return draw.conditional
        if pull is not None:
            return projected(draw.conditional, pull, scale)
        if method in (GuidanceMethod.CFG, GuidanceMethod.APG):
            return classifier_free(draw.conditional, draw.unconditional, scale)
        data = by_angle(
            cleaned(draw.latents, draw.conditional, draw.time),
            cleaned(draw.latents, draw.unconditional, draw.time),
            scale,
            largest_angle=_LARGEST_ANGLE[method],
        )
        if method is GuidanceMethod.ADG_NORMED:
            data = as_long(data, cleaned(draw.latents, draw.conditional, draw.time))
        return (draw.latents - data) / draw.time


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Go on in the direction from unconditional to conditional (CFG)."""
    return unconditional + scale * (conditional - unconditional)


def projected(conditional: Tensor, pull: Tensor, scale: float) -> Tensor:
    """Go where a pull leads across the conditional velocity (APG): bounded, and without what runs along it.

    Both are measured for each channel over all frames.
    """
    pull = pull * (_LONGEST_DIFFERENCE / pull.norm(dim=0)).clamp(max=1)
    # In double precision: what is left is small beside what is taken away.
    direction = torch.nn.functional.normalize(conditional.double(), dim=0)
    along = (pull.double() * direction).sum(0) * direction
    return conditional + (scale - 1) * (pull.double() - along).to(conditional.dtype)


def by_angle(conditional: Tensor, unconditional: Tensor, scale: float, *, largest_angle: float) -> Tensor:
    """Turn each frame of conditional data on from unconditional data (ADG), by at most an angle in radians."""
    weight = scale - 1 + 1e-3
    cosine = torch.nn.functional.cosine_similarity(conditional.double(), unconditional.double(), dim=1)
    angle = cosine.clamp(-1, 1).acos()[:, None]
    turned = (weight * angle).clamp(max=largest_angle)
    difference = conditional - unconditional
    length = unconditional.square().sum(1, keepdim=True)
    across = difference - unconditional * (difference * unconditional).sum(1, keepdim=True) / (length + 1e-8)
    # Of two directions that are all but one the sines' ratio is that of the angles.
    gain = torch.where(angle.sin() > 1e-3, turned.sin() / angle.sin(), weight)
    return (turned.cos() * conditional + gain * across).to(conditional.dtype)


def as_long(data: Tensor, other: Tensor) -> Tensor:
    """Give each channel of data the length, over all frames, that it has in the other."""
    return data * other.norm(dim=0) / data.norm(dim=0).clamp(min=1e-8)
