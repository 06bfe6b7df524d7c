"""Noise to latents along a straight flow: x = t noise + (1 - t) data, velocity = noise - data."""

import torch
from torch import Tensor


def schedule(steps: int, shift: float) -> list[float]:
    """Return the times of a song, from 1 to 0: one a step and the end; a larger shift dwells on noise."""
    even = [1 - step / steps for step in range(steps)]
    return [shift * time / (1 + (shift - 1) * time) for time in even] + [0.0]


def draw_noise(seed: int, frames: int, channels: int) -> Tensor:
    """Draw noise [frames, channels], float32 on the CPU, so that a seed means the same on every device."""
    return torch.randn(frames, channels, generator=torch.Generator().manual_seed(seed))


def euler(latents: Tensor, velocity: Tensor, time: float, next_time: float) -> Tensor:
    """Move latents from one time to the next; from any time to 0 gives the data the model sees."""
    return latents - velocity * (time - next_time)
