"""A song's way from noise to latents, as a generator that asks for velocities.

The engine collects what all songs in flight ask for just then, answers it with one forward pass, and sends each song
its own answers. So a song may ask for one velocity a step or for four, and need not know of any other.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from soundstage_dit.sampler import draw_noise, euler
from soundstage_dit.song import Song


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the transformer sees beside the latents."""

    context: Tensor  # [frames, 2 x channels]: the source and the mask
    memory: Tensor  # [layers, 2, kv_heads, conditions, head_dim]: keys and values of words and timbre


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A song's conditions on the device.

    `unconditional` is there where guidance asks for it: no words, in the context of `conditional`. `words` takes over
    where a cover stops following its source, with an unconditional of its own context. `told` is the source in its own
    words, where an edit starts, in the context of `conditional`. `source` is the latents [frames, channels], float32,
    that a repaint keeps, an edit moves and a cover may start from; silence where a song with such a task has none.
    """

    channels: int
    conditional: Conditions
    unconditional: Conditions | None = None
    words: Conditions | None = None
    words_unconditional: Conditions | None = None
    told: Conditions | None = None
    source: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A velocity that is asked for: of latents [frames, channels], float32, at a time, under conditions."""

    latents: Tensor
    time: float
    conditions: Conditions


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a song asks for at once; `steps_done` steps are behind it."""

    steps_done: int
    queries: Sequence[Query]


# Sent velocities [frames, channels], float32, one for each query; returns the latents [frames, channels].
Trajectory = Generator[Evaluation, Sequence[Tensor], Tensor]


def trajectory(song: Song, prepared: Prepared) -> Trajectory:
    """Lead a song from noise to latents."""
    times = song.diffusion.times
    latents = draw_noise(song.seed, song.num_frames, prepared.channels).to(prepared.conditional.context.device)
    for step in range(song.diffusion.steps):
        query = Query(latents=latents, time=times[step], conditions=prepared.conditional)
        [velocity] = yield Evaluation(steps_done=step, queries=[query])
        latents = euler(latents, velocity, times[step], times[step + 1])
    return latents
