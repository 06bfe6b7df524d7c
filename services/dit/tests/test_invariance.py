"""A song is the same to the bit whatever goes on beside it, and whoever leaves; on a GPU it is so but for rounding."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.random import Generator

from soundstage_dit.engine import DitEngine
from soundstage_dit.schedule import schedule
from soundstage_dit.song import (
    Complete,
    Cover,
    Diffusion,
    Edit,
    Extract,
    Guidance,
    GuidanceMethod,
    Lego,
    Repaint,
    Retake,
    Sampler,
    Song,
    Task,
    TextToMusic,
    Wavelet,
)
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.score import REFERENCE_LATENTS
from soundstage_runtime.worker import Worker

from .test_engine import finish

TOLERANCE = 1e-5  # one matrix product over another number of rows adds in another order
LONGEST = 3000
MIXES, QUICK = 100, 25
LATER = range(QUICK, MIXES)


def draw_task(draw: Generator, frames: int) -> Task:
    """Any task over a source of so many frames."""
    start = int(draw.integers(frames))
    end = int(draw.integers(start + 1, frames + 1))
    strength, noise = float(draw.choice([0.0, 0.3, 1.0])), float(draw.choice([0.0, 0.5]))
    tasks: list[Task] = [
        TextToMusic(),
        TextToMusic(),
        Cover(strength=strength, noise_strength=noise),
        Cover(strength=strength, from_latents=True),
        Repaint(start=start, end=end, injection=float(draw.random()), blend_frames=int(draw.integers(10))),
        Edit(source_caption="a harp", source_lyrics="lo", averages=2, end=0.7),
        Edit(source_caption="", source_lyrics="la", context="codes"),
        Lego(track="drums", start=start, end=end),
        Extract(track="bass"),
        Complete(tracks=("vocals",)),
    ]
    return tasks[draw.integers(len(tasks))]


def draw_diffusion(draw: Generator) -> Diffusion:
    """Any way to the latents, of up to three steps."""
    start, end = sorted(draw.random(2))
    is_always_guided = draw.random() < 0.5
    return Diffusion(
        times=tuple(schedule(int(draw.integers(1, 4)), float(draw.uniform(1, 5)))),
        sampler=list(Sampler)[draw.integers(3)],
        guidance=Guidance(
            scale=float(draw.choice([1.0, 1.0, 3.0, 7.0])),
            method=list(GuidanceMethod)[draw.integers(5)],
            start=0.0 if is_always_guided else float(start),
            end=1.0 if is_always_guided else float(end),
        ),
        velocity_norm_threshold=float(draw.choice([0.0, 2.0])),
        velocity_ema_factor=float(draw.choice([0.0, 0.2])),
        wavelet=Wavelet() if draw.random() < 0.3 else None,
        retake=Retake(seed=int(draw.integers(100))) if draw.random() < 0.2 else None,
    )


def draw_song(draw: Generator) -> Song:
    """Any song: as many of 1 to 10 frames as of 300 to 3000."""
    frames = round(LONGEST ** float(draw.random()))
    task = draw_task(draw, frames)
    can_have_codes = isinstance(task, TextToMusic) or (isinstance(task, Cover) and not task.from_latents)
    num_codes = int(draw.integers(1, -(-frames // 5) + 1)) if can_have_codes and draw.random() < 0.5 else 0
    references = [draw.standard_normal((REFERENCE_LATENTS, 64), np.float32) for _ in range(int(draw.random() < 0.1))]
    return Song(
        caption="a calm piano " * int(draw.integers(3)),
        lyrics="la la あ\n" * int(draw.integers(12)),
        num_frames=frames,
        seed=int(draw.integers(2**32)),
        codes=tuple(map(int, draw.integers(0, 64_000, num_codes))),
        task=task,
        source=None if isinstance(task, TextToMusic) else draw.standard_normal((frames, 64), np.float32),
        references=tuple(references),
        diffusion=draw_diffusion(draw),
    )


@pytest.fixture
async def alone(base_model: LoadedModel) -> AsyncIterator[DitEngine]:
    """An engine that has one song at a time."""
    engine = DitEngine([base_model], Worker("alone"), max_songs=1)
    yield engine
    engine.close()


def test_the_mixes_have_all_lengths_tasks_and_guidances() -> None:
    songs = [draw_song(np.random.default_rng((mix, number))) for mix in range(MIXES) for number in range(3)]
    lengths = np.array([song.num_frames for song in songs])
    assert len(set(lengths)) > MIXES
    assert (lengths.min(), lengths.max() > 0.95 * LONGEST) == (1, True)
    assert {type(song.task) for song in songs} == {TextToMusic, Cover, Repaint, Edit, Lego, Extract, Complete}
    guided = {song.diffusion.guidance.method for song in songs if song.diffusion.guidance.scale == 7}
    assert guided == set(GuidanceMethod)
    assert {song.diffusion.steps for song in songs} == {1, 2, 3}


@pytest.mark.parametrize("mix", [*range(QUICK), *(pytest.param(mix, marks=pytest.mark.soak) for mix in LATER)])
async def test_a_song_beside_others_is_the_same_to_the_bit(base_model: LoadedModel, alone: DitEngine, mix: int) -> None:
    draw = np.random.default_rng((mix, 9))
    songs = [draw_song(np.random.default_rng((mix, number))) for number in range(3)]
    engine = DitEngine(
        [base_model],
        Worker("together"),
        max_batch=int(draw.integers(2, 5)),
        max_tokens=int(draw.integers(10, 4000)),
        max_songs=int(draw.integers(2, 4)),
    )
    together = await asyncio.gather(*(finish(engine, song) for song in songs))
    assert engine.num_songs == 0
    engine.close()
    for song, latents in zip(songs, together, strict=True):
        np.testing.assert_array_equal(latents, await finish(alone, song))


@pytest.mark.parametrize("mix", range(12))
async def test_a_song_that_is_cancelled_at_any_step_changes_no_other(
    base_model: LoadedModel, alone: DitEngine, mix: int
) -> None:
    draw = np.random.default_rng((mix, 8))
    songs = [draw_song(np.random.default_rng((mix, number))) for number in range(3)]
    steps = int(draw.integers(2, 5))
    times = tuple(schedule(steps, 3.0))
    songs = [replace(song, diffusion=replace(song.diffusion, times=times)) for song in songs]
    order = draw.permutation(3)
    leaving, last_step = songs.pop(int(draw.integers(3))), int(draw.integers(1, steps))
    engine = DitEngine([base_model], Worker("together"))

    async def leave() -> None:
        async with aclosing(engine.denoise(leaving)) as events:
            async for event in events:
                if event == last_step:
                    return
        raise AssertionError("it came to its end")

    calls = [finish(engine, songs[0]), finish(engine, songs[1]), leave()]
    results = await asyncio.gather(*(calls[index] for index in order))
    assert engine.num_songs == 0
    engine.close()
    by_call = dict(zip(order.tolist(), results, strict=True))
    for index, song in enumerate(songs):
        np.testing.assert_array_equal(by_call[index], await finish(alone, song))


@torch.inference_mode()
@pytest.mark.parametrize("mix", range(20))
def test_in_one_sequence_as_a_gpu_has_them_songs_differ_by_rounding_alone(base_model: LoadedModel, mix: int) -> None:
    source = torch.Generator().manual_seed(mix)
    draw = np.random.default_rng(mix)
    frames = [round(LONGEST ** float(draw.random())) for _ in range(int(draw.integers(2, 6)))]
    dit, times = base_model.dit, torch.rand(len(frames), generator=source)
    latents = [torch.randn(count, 64, generator=source) for count in frames]
    contexts = [torch.randn(count, 128, generator=source) for count in frames]
    conditions = [torch.randn(int(draw.integers(1, 300)), 64, generator=source) for _ in frames]
    memories = [dit.remember(each) for each in conditions]
    nothing = [()] * len(frames)
    together = dit.run(latents, times, contexts, memories, nothing)
    for song in range(len(frames)):
        own = slice(song, song + 1)
        [expected] = dit.run(latents[own], times[own], contexts[own], memories[own], nothing[own])
        torch.testing.assert_close(together[song], expected, atol=TOLERANCE, rtol=TOLERANCE)
