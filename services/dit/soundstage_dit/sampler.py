"""Noise to latents along a straight flow: x = t noise + (1 - t) data, velocity = noise - data.

Small functions of tensors [frames, channels] and numbers. Times fall from at most 1 and end in 0, the data.
"""

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from soundstage_dit.song import WaveletMode


class Purpose(IntEnum):
    """What noise is for, other than the start. Each has a stream of its own, so that none depends on another."""

    STEP = 1
    EDIT = 2


def draw_noise(seed: int, frames: int, channels: int) -> Tensor:
    """Draw noise [frames, channels], float32 on the CPU, so that a seed means the same on every device."""
    return torch.randn(frames, channels, generator=torch.Generator().manual_seed(seed))


def draw_noises(seed: int, purpose: Purpose, frames: int, channels: int) -> Iterator[Tensor]:
    """Draw noise after noise, each as draw_noise does, for a purpose."""
    # The generator takes 32 bits, all of which a song's own seed may fill: purposes are told apart by a hash.
    [derived] = np.random.SeedSequence(seed, spawn_key=(purpose,)).generate_state(1)
    generator = torch.Generator().manual_seed(int(derived))
    while True:
        yield torch.randn(frames, channels, generator=generator)


def retake(noise: Tensor, second: Tensor, variance: float) -> Tensor:
    """Turn one noise towards another: 0 leaves it, 1 reaches the second, and all between are noise just as well."""
    angle = variance * math.pi / 2
    return math.cos(angle) * noise + math.sin(angle) * second


def noised(data: Tensor, noise: Tensor, time: float) -> Tensor:
    """Return what data looks like at a time; at 0 the data itself."""
    return time * noise + (1 - time) * data


def cleaned(latents: Tensor, velocity: Tensor, time: float) -> Tensor:
    """Return the data that the model sees in latents."""
    return euler(latents, velocity, time, 0.0)


def start_from(source: Tensor, noise: Tensor, times: Sequence[float], strength: float) -> tuple[Tensor, list[float]]:
    """Begin with part of a source in the noise: return the first latents and the times that are left.

    It begins at the time nearest to 1 - strength; a strength of 0 is noise alone and all times.
    """
    if strength == 0:
        return noise, list(times)
    first = min(range(len(times) - 1), key=lambda step: abs(times[step] - (1 - strength)))
    return noised(source, noise, times[first]), list(times[first:])


def switch_step(steps: int, strength: float) -> int:
    """Return the first step at which a cover no longer follows its source."""
    return int(steps * strength)


def euler(latents: Tensor, velocity: Tensor, time: float, next_time: float) -> Tensor:
    """Move latents from one time to the next; from any time to 0 gives the data the model sees."""
    return latents - velocity * (time - next_time)


def bounded(velocity: Tensor, latents: Tensor, threshold: float) -> Tensor:
    """Shorten a velocity to `threshold` times the length of its latents; 0 bounds nothing."""
    if threshold == 0:
        return velocity
    return velocity * (threshold * latents.norm() / velocity.norm().clamp(min=1e-10)).clamp(max=1)


def smoothed(velocity: Tensor, previous: Tensor | None, factor: float) -> Tensor:
    """Mix in `factor` of the velocity before, if there is one; 0 mixes nothing."""
    if factor == 0 or previous is None:
        return velocity
    return (1 - factor) * velocity + factor * previous


def band_weights(mode: WaveletMode, time: float, scale: float, high_scale: float) -> tuple[float, float]:
    """Return by how much the low and the high band are corrected after a step from a time."""
    match mode:
        case "double":
            return time * scale, (1 - time) * high_scale
        case "low":
            return time * scale, 0.0
        case "high":
            return 0.0, (1 - time) * scale
        case "pixel":
            return scale, scale


def correct_bands(latents: Tensor, data: Tensor, low_weight: float, high_weight: float) -> Tensor:
    """Push latents away from data, in the low and in the high band of one Haar level along the frames.

    An odd last frame is paired with zeros.
    """
    frames, channels = latents.shape
    difference = latents - data
    pairs = torch.nn.functional.pad(difference, (0, 0, 0, frames % 2)).view(-1, 2, channels)
    low = pairs.mean(1).repeat_interleave(2, dim=0)[:frames]
    return latents + low_weight * low + high_weight * (difference - low)


def inject(latents: Tensor, source: Tensor, noise: Tensor, time: float, start: int, end: int) -> Tensor:
    """Put a source back outside of frames [start, end), as it looks at a time."""
    kept = noised(source, noise, time)
    return torch.cat([kept[:start], latents[start:end], kept[end:]])


def blend(latents: Tensor, source: Tensor, start: int, end: int, ramp_frames: int) -> Tensor:
    """Keep latents in frames [start, end) and go over to a source within `ramp_frames` beyond, or up to the song's end.

    The ramps have neither 0 nor 1 in them, and where both are the same to the bit so is what they blend to.
    """
    frames = len(source)
    before, after = min(ramp_frames, start), min(ramp_frames, frames - end)
    weights = torch.zeros(frames)
    weights[start - before : start] = torch.arange(1, before + 1) / (before + 1)
    weights[start:end] = 1
    weights[end : end + after] = torch.arange(after, 0, -1) / (after + 1)
    return torch.lerp(source, latents, weights.to(source.device)[:, None])


def rescale(latents: Tensor, factor: float, shift: float) -> Tensor:
    """Multiply latents and then shift them."""
    return latents * factor + shift
