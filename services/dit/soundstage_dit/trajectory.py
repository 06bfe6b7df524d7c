"""A song's way from noise to latents, as a generator that asks for velocities.

The engine collects what all songs in flight ask for just then, answers it with one forward pass, and sends each song
its own answers. So a song may ask for one velocity a step or for four, and need not know of any other.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from soundstage_dit.guidance import Estimate, Guide
from soundstage_dit.model.adapter import Adaptation
from soundstage_dit.sampler import (
    Purpose,
    band_weights,
    blend,
    bounded,
    cleaned,
    correct_bands,
    draw_noise,
    draw_noises,
    euler,
    inject,
    noised,
    rescale,
    retake,
    smoothed,
    start_from,
    switch_step,
)
from soundstage_dit.song import Cover, Diffusion, Edit, Guidance, GuidanceMethod, Repaint, Sampler, Song, Wavelet


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the transformer sees beside the latents."""

    context: Tensor  # [frames, 2 x channels]: the source and the mask
    memory: Tensor  # [layers, 2, kv_heads, conditions, head_dim]: keys and values of words and timbre
    adaptations: Sequence[Adaptation] = ()  # the adapters at work; `memory` was made with them too


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
    """Lead a song from noise to latents, or an edit from its source."""
    if isinstance(song.task, Edit):
        latents = yield from _edit(song, song.task, prepared)
    else:
        latents = yield from _denoise(song, prepared)
    return rescale(latents, song.diffusion.latent_rescale, song.diffusion.latent_shift)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Branch:
    """What latents are asked for under, with words and without."""

    conditional: Conditions
    unconditional: Conditions | None


class _Steering:
    """Makes velocities of what the transformer answers: guided, bounded, and smoothed from step to step."""

    def __init__(self, diffusion: Diffusion, guidance: Guidance) -> None:
        self._threshold = diffusion.velocity_norm_threshold
        self._factor = diffusion.velocity_ema_factor
        self._guide = Guide(guidance)
        self._previous: Tensor | None = None

    def ask(self, latents: Tensor, time: float, branch: _Branch) -> list[Query]:
        """Ask for latents' velocity with words, and for that without where guidance wants it."""
        wanted = [branch.conditional]
        if branch.unconditional is not None and self._guide.applies(time):
            wanted.append(branch.unconditional)
        return [Query(latents=latents, time=time, conditions=conditions) for conditions in wanted]

    def settle(self, draws: Sequence[Estimate]) -> Tensor:
        """Return the velocity of a step: the mean of its draws."""
        guided = zip(self._guide.guide(draws), draws, strict=True)
        velocities = [bounded(velocity, draw.latents, self._threshold) for velocity, draw in guided]
        self._previous = smoothed(torch.stack(velocities).mean(0), self._previous, self._factor)
        return self._previous

    def correct(self, velocity: Tensor, ahead: Estimate) -> Tensor:
        """Return the velocity of a step that has also looked ahead: the mean of both ends."""
        second = bounded(self._guide.correct(ahead), ahead.latents, self._threshold)
        self._previous = (velocity + smoothed(second, velocity, self._factor)) / 2
        return self._previous


def _look(steps_done: int, queries: Sequence[Query]) -> Generator[Evaluation, Sequence[Tensor], Estimate]:
    return _estimate(queries, (yield Evaluation(steps_done=steps_done, queries=queries)))


def _estimate(queries: Sequence[Query], velocities: Sequence[Tensor]) -> Estimate:
    return Estimate(
        latents=queries[0].latents,
        time=queries[0].time,
        conditional=velocities[0],
        unconditional=velocities[1] if len(velocities) > 1 else None,
    )


def _denoise(song: Song, prepared: Prepared) -> Trajectory:
    """Lead noise to latents; where a cover begins with its source, the steps before its first time count as done."""
    diffusion, task = song.diffusion, song.task
    noise = _first_noise(song, prepared)
    latents, times = noise, list(diffusion.times)
    if isinstance(task, Cover) and task.noise_strength > 0:
        latents, times = start_from(_source(prepared), noise, times, task.noise_strength)
    steps = len(times) - 1
    switch = switch_step(steps, task.strength) if isinstance(task, Cover) else steps
    injected = round(steps * task.injection) if isinstance(task, Repaint) else 0
    fresh = _later_noises(song, prepared, Purpose.STEP)
    steering = _Steering(diffusion, diffusion.guidance)
    for step, (time, next_time) in enumerate(pairwise(times)):
        done = diffusion.steps - steps + step
        branch = _own(prepared) if step < switch else _words(prepared)
        velocity = steering.settle([(yield from _look(done, steering.ask(latents, time, branch)))])
        data = cleaned(latents, velocity, time)
        if diffusion.sampler is Sampler.HEUN and next_time > 0:
            ahead = euler(latents, velocity, time, next_time)
            velocity = steering.correct(velocity, (yield from _look(done, steering.ask(ahead, next_time, branch))))
        if diffusion.sampler is Sampler.SDE:
            latents = noised(data, next(fresh), next_time)
        else:
            latents = euler(latents, velocity, time, next_time)
        if diffusion.wavelet is not None:
            latents = _correct_bands(latents, data, time, diffusion.wavelet)
        if isinstance(task, Repaint) and step < injected:
            latents = inject(latents, _source(prepared), noise, next_time, task.start, task.end)
    if isinstance(task, Repaint) and task.blend_frames > 0:
        latents = blend(latents, _source(prepared), task.start, task.end, task.blend_frames)
    return latents


def _edit(song: Song, task: Edit, prepared: Prepared) -> Trajectory:
    """Move a source by the difference of what its own words and the song's make of it, then on by the song's alone.

    Steps are Euler's. Guidance by angle is APG instead, and each side has a momentum of its own.
    """
    diffusion, source = song.diffusion, _source(prepared)
    guidance = diffusion.guidance
    if guidance.method is not GuidanceMethod.CFG:
        guidance = replace(guidance, method=GuidanceMethod.APG)
    away, towards = _Steering(diffusion, guidance), _Steering(diffusion, guidance)
    noises = _later_noises(song, prepared, Purpose.EDIT)
    first, last = int(diffusion.steps * task.start), int(diffusion.steps * task.end)
    way = list(enumerate(pairwise(diffusion.times)))
    edited = source
    for step, (time, next_time) in way[first:last]:
        away_draws: list[Estimate] = []
        towards_draws: list[Estimate] = []
        for _ in range(task.averages):
            start = noised(source, next(noises), time)
            from_source = away.ask(start, time, _told(prepared))
            from_edited = towards.ask(edited + start - source, time, _own(prepared))
            answers = yield Evaluation(steps_done=step, queries=[*from_source, *from_edited])
            away_draws.append(_estimate(from_source, answers[: len(from_source)]))
            towards_draws.append(_estimate(from_edited, answers[len(from_source) :]))
        velocity = towards.settle(towards_draws) - away.settle(away_draws)
        edited = euler(edited, velocity, time, next_time)
    for step, (time, next_time) in way[last:]:
        if step == last:
            edited = edited + noised(source, next(noises), time) - source
        velocity = towards.settle([(yield from _look(step, towards.ask(edited, time, _own(prepared))))])
        edited = euler(edited, velocity, time, next_time)
    return edited


def _own(prepared: Prepared) -> _Branch:
    return _Branch(conditional=prepared.conditional, unconditional=prepared.unconditional)


def _words(prepared: Prepared) -> _Branch:
    assert prepared.words is not None
    return _Branch(conditional=prepared.words, unconditional=prepared.words_unconditional)


def _told(prepared: Prepared) -> _Branch:
    assert prepared.told is not None
    return _Branch(conditional=prepared.told, unconditional=prepared.unconditional)


def _source(prepared: Prepared) -> Tensor:
    assert prepared.source is not None
    return prepared.source


def _first_noise(song: Song, prepared: Prepared) -> Tensor:
    noise = draw_noise(song.seed, song.num_frames, prepared.channels)
    again = song.diffusion.retake
    if again is not None:
        noise = retake(noise, draw_noise(again.seed, song.num_frames, prepared.channels), again.variance)
    return noise.to(prepared.conditional.context.device)


def _later_noises(song: Song, prepared: Prepared, purpose: Purpose) -> Iterator[Tensor]:
    """Yield noises that are retaken as the first is."""
    again = song.diffusion.retake
    noises = draw_noises(song.seed, purpose, song.num_frames, prepared.channels)
    if again is not None:
        seconds = draw_noises(again.seed, purpose, song.num_frames, prepared.channels)
        noises = (retake(noise, next(seconds), again.variance) for noise in noises)
    return (noise.to(prepared.conditional.context.device) for noise in noises)


def _correct_bands(latents: Tensor, data: Tensor, time: float, wavelet: Wavelet) -> Tensor:
    return correct_bands(latents, data, *band_weights(wavelet.mode, time, wavelet.scale, wavelet.high_scale))
