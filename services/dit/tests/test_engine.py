"""Batching: songs that share steps never change one another, come and go, and fail alone."""

import asyncio
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Never, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundstage_dit.engine import DitEngine
from soundstage_dit.journey import DenoiseError
from soundstage_dit.line import SongTooLargeError
from soundstage_dit.memory import estimate_bytes
from soundstage_dit.model.adapter import Adaptation
from soundstage_dit.model.dit import Dit, DitLayer
from soundstage_dit.schedule import schedule
from soundstage_dit.scheduler import Queued
from soundstage_dit.song import (
    Diffusion,
    Guidance,
    Song,
)
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import OverloadedError
from soundstage_runtime.worker import Worker

# One matrix product over another number of rows adds in another order.
TOLERANCE = 1e-5


class Stepwise:
    """A transformer that waits for leave before every step, and records how many songs each step had."""

    def __init__(self, dit: Dit) -> None:
        self.remember = dit.remember
        self.shape = dit.shape
        self.layers = dit.layers
        self.batches: list[int] = []
        self.last = 0  # how long the last song of the latest step is
        self.failures: list[Exception] = []
        self._dit = dit
        self._leave = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)

    def allow(self, steps: int) -> None:
        """Let that many steps through."""
        self._leave.release(steps)

    async def wait_for_step(self) -> None:
        """Wait until one more step has begun."""
        await asyncio.to_thread(self._entered.acquire)

    def __call__(
        self,
        latents: Sequence[Tensor],
        times: Tensor,
        contexts: Sequence[Tensor],
        memories: Sequence[Tensor],
        adaptations: Sequence[Sequence[Adaptation]] | None = None,
    ) -> list[Tensor]:
        self.batches.append(len(latents))
        self.last = len(latents[-1])
        self._entered.release()
        self._leave.acquire()
        if self.failures:
            raise self.failures.pop()
        return self._dit(latents, times, contexts, memories, adaptations)


def stepwise(model: LoadedModel, **limits: Any) -> tuple[Stepwise, DitEngine]:
    """An engine whose steps a test lets through."""
    steps = Stepwise(model.dit)
    return steps, DitEngine([replace(model, dit=cast(Dit, steps))], Worker("dit"), **limits)


async def finish(engine: DitEngine, song: Song) -> NDArray[np.float32]:
    """Denoise to the end; checks the progress on the way."""
    *steps, latents = [event async for event in engine.denoise(song) if not isinstance(event, Queued)]
    assert steps == list(range(1, song.diffusion.steps + 1))
    assert isinstance(latents, np.ndarray)
    return latents


def song_of(frames: int, steps: int, seed: int = 0) -> Song:
    """A song of that size."""
    return Song(
        caption=f"song {seed}",
        lyrics="la " * seed,
        num_frames=frames,
        seed=seed,
        diffusion=Diffusion(times=tuple(schedule(steps, 3.0))),
    )


@torch.inference_mode()
def test_a_short_song_beside_a_long_one_is_not_touched_by_it(model: LoadedModel) -> None:
    source = torch.Generator().manual_seed(0)
    lengths, conditions = (3, 500), (4, 90)
    latents = [torch.randn(length, 64, generator=source) for length in lengths]
    contexts = [torch.randn(length, 128, generator=source) for length in lengths]
    memories = [model.dit.remember(torch.randn(count, 64, generator=source)) for count in conditions]
    times = torch.tensor([0.9, 0.3])
    run, nothing = model.dit.run, [(), ()]
    together = run(latents, times, contexts, memories, nothing)[0]
    poisoned = [contexts[0], torch.full_like(contexts[1], torch.nan)]
    assert torch.equal(run(latents, times, poisoned, memories, nothing)[0], together)
    alone = run(latents[:1], times[:1], contexts[:1], memories[:1], nothing[:1])[0]
    torch.testing.assert_close(together, alone, atol=TOLERANCE, rtol=TOLERANCE)


async def test_a_song_that_joins_midway_changes_no_other(model: LoadedModel) -> None:
    early, late = song_of(70, steps=6, seed=1), song_of(33, steps=3, seed=2)
    steps, engine = stepwise(model)
    first = asyncio.create_task(finish(engine, early))
    await steps.wait_for_step()
    steps.allow(1)
    await steps.wait_for_step()
    second = asyncio.create_task(finish(engine, late))
    steps.allow(100)
    together = [await first, await second]
    assert steps.batches == [1, 1, 2, 2, 2, 1]
    alone = [await finish(engine, song) for song in (early, late)]
    engine.close()
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one, other)


async def test_a_cancelled_song_leaves_before_the_next_step(model: LoadedModel) -> None:
    staying, leaving = song_of(40, steps=8, seed=1), song_of(40, steps=8, seed=2)
    steps, engine = stepwise(model)
    stay, leave = engine.denoise(staying), engine.denoise(leaving)
    first = [asyncio.create_task(anext(song)) for song in (stay, leave)]
    await steps.wait_for_step()
    while steps.batches[-2:] != [2, 2]:
        steps.allow(1)
        await steps.wait_for_step()
    await asyncio.gather(*first)
    begun = len(steps.batches)
    await leave.aclose()
    assert engine.num_songs == 1
    steps.allow(100)
    *_, latents = [event async for event in stay]
    assert engine.num_songs == 0
    assert set(steps.batches[begun:]) == {1}
    assert isinstance(latents, np.ndarray)
    alone = await finish(engine, staying)
    engine.close()
    np.testing.assert_array_equal(latents, alone)


async def test_steps_stop_when_the_last_song_is_cancelled(model: LoadedModel) -> None:
    steps, engine = stepwise(model)
    task = asyncio.create_task(finish(engine, song_of(40, steps=20)))
    await steps.wait_for_step()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.num_songs == 0
    steps.allow(100)
    await finish(engine, song_of(10, steps=1))
    engine.close()
    assert steps.batches == [1, 1]


async def test_no_step_has_more_songs_than_max_batch_and_the_first_go_first(model: LoadedModel) -> None:
    steps, engine = stepwise(model, max_batch=2)
    order: list[int] = []

    async def note(number: int) -> None:
        await finish(engine, song_of(20, steps=3, seed=number))
        order.append(number)

    tasks = [asyncio.create_task(note(number)) for number in range(5)]
    steps.allow(100)
    await asyncio.gather(*tasks)
    engine.close()
    assert max(steps.batches) == 2
    assert sorted(order) == list(range(5))
    assert order[-1] == 4


async def test_a_failed_step_fails_its_songs_and_the_next_ones_go_well(model: LoadedModel) -> None:
    steps, engine = stepwise(model)
    steps.failures.append(RuntimeError("out of memory"))
    steps.allow(100)
    with pytest.raises(DenoiseError, match="a diffusion step failed: RuntimeError"):
        await finish(engine, song_of(40, steps=4))
    assert engine.num_songs == 0
    assert (await finish(engine, song_of(40, steps=4))).shape == (40, 64)
    engine.close()


async def test_a_turn_that_fails_ends_its_songs_and_those_that_wait_go_on(model: LoadedModel) -> None:
    steps, engine = stepwise(model, max_songs=2)

    class Immeasurable:
        def __getitem__(self, _: slice) -> Never:
            steps.layers = model.dit.layers
            raise LookupError

    steps.layers = cast(list[DitLayer], Immeasurable())
    steps.allow(100)
    async with asyncio.timeout(10):
        songs = (finish(engine, song_of(20, steps=2, seed=seed)) for seed in range(4))
        *failed, third, fourth = await asyncio.gather(*songs, return_exceptions=True)
    assert [repr(failure) for failure in failed] == ["DenoiseError('a turn of the songs failed: LookupError')"] * 2
    assert isinstance(third, np.ndarray)
    assert isinstance(fourth, np.ndarray)
    assert (engine.num_songs, engine.num_waiting) == (0, 0)
    engine.close()


async def test_latents_that_are_not_finite_are_an_error(model: LoadedModel) -> None:
    class Diverging(Stepwise):
        def __call__(self, latents: Sequence[Tensor], *_: Any) -> list[Tensor]:
            return [torch.full_like(song, torch.nan) for song in latents]

    engine = DitEngine([replace(model, dit=cast(Dit, Diverging(model.dit)))], Worker("dit"), max_batch=1)
    with pytest.raises(DenoiseError, match="not finite"):
        await finish(engine, song_of(4, steps=1))
    engine.close()


class Watched(Stepwise):
    """One that remembers every tensor it was given, but keeps none."""

    def __init__(self, dit: Dit) -> None:
        super().__init__(dit)
        self.seen: dict[int, list[weakref.ref[Tensor]]] = {}

    def __call__(
        self,
        latents: Sequence[Tensor],
        times: Tensor,
        contexts: Sequence[Tensor],
        memories: Sequence[Tensor],
        adaptations: Sequence[Sequence[Adaptation]] | None = None,
    ) -> list[Tensor]:
        for song in zip(latents, contexts, memories, strict=True):
            self.seen.setdefault(len(song[0]), []).extend(map(weakref.ref, song))
        return super().__call__(latents, times, contexts, memories, adaptations)

    def num_alive(self, frames: int) -> int:
        """Count the tensors of songs of that length."""
        return sum(tensor() is not None for tensor in self.seen[frames])


@pytest.mark.parametrize("max_batch", [1, 2])
async def test_a_cancelled_songs_tensors_are_dropped_at_once(model: LoadedModel, max_batch: int) -> None:
    steps = Watched(model.dit)
    engine = DitEngine([replace(model, dit=cast(Dit, steps))], Worker("dit"), max_batch=max_batch)
    stay, leave = engine.denoise(song_of(40, steps=9, seed=1)), engine.denoise(song_of(30, steps=9, seed=2))
    first = [asyncio.create_task(anext(song)) for song in (stay, leave)]
    await steps.wait_for_step()
    while not all(task.done() for task in first):
        steps.allow(1)
        await steps.wait_for_step()
    # A step is in hand, of the staying song alone where only one goes at a time.
    while max_batch == 1 and engine.num_songs == 2 and steps.last != 40:
        steps.allow(1)
        await steps.wait_for_step()
    assert steps.num_alive(30) > 0
    await leave.aclose()
    if max_batch == 2:  # until its last step is done
        steps.allow(1)
        await steps.wait_for_step()
    assert steps.num_alive(30) == 0
    assert steps.num_alive(40) > 0
    await stay.aclose()
    steps.allow(100)
    engine.close()


async def test_a_song_that_fails_between_steps_fails_alone(model: LoadedModel) -> None:
    class Misshapen(Stepwise):
        def __call__(self, latents: Sequence[Tensor], *others: Any) -> list[Tensor]:
            velocities = super().__call__(latents, *others)
            return [velocity[1:] if len(velocity) == 13 else velocity for velocity in velocities]

    steps = Misshapen(model.dit)
    steps.allow(100)
    engine = DitEngine([replace(model, dit=cast(Dit, steps))], Worker("dit"))
    good = asyncio.create_task(finish(engine, song_of(40, steps=4, seed=1)))
    with pytest.raises(DenoiseError, match="the song failed between steps: RuntimeError"):
        await finish(engine, song_of(13, steps=4, seed=2))
    latents = await good
    assert 2 in steps.batches
    np.testing.assert_array_equal(latents, await finish(engine, song_of(40, 4, 1)))
    assert engine.num_songs == 0
    engine.close()


async def test_a_song_that_cannot_be_prepared_fails_alone(model: LoadedModel) -> None:
    steps, engine = stepwise(model)

    def refuse(conditions: Tensor, adaptations: Sequence[Adaptation] = ()) -> Tensor:
        steps.remember = model.dit.remember
        raise RuntimeError("out of memory")

    steps.remember = refuse
    steps.allow(100)
    first, second = (asyncio.create_task(finish(engine, song_of(20, steps=2, seed=seed))) for seed in (1, 2))
    with pytest.raises(DenoiseError, match="RuntimeError"):
        await first
    assert (await second).shape == (20, 64)
    engine.close()


async def test_a_long_song_and_short_ones_take_turns(model: LoadedModel) -> None:
    steps, engine = stepwise(model, max_tokens=600)
    order: list[int] = []

    async def note(song: Song) -> None:
        async for event in engine.denoise(song):
            if isinstance(event, int):
                order.append(song.num_frames)

    steps.allow(100)
    await asyncio.gather(note(song_of(1200, steps=3)), note(song_of(40, steps=12)), note(song_of(4, steps=12)))
    engine.close()
    # The long one is charged 856 a step, the others 276 and 258: so many steps of theirs, between two of its own.
    first, second, third = (index for index, frames in enumerate(order) if frames == 1200)
    for short in (40, 4):
        assert 3 <= order[first:second].count(short) <= 4
        assert 3 <= order[second:third].count(short) <= 4


async def test_songs_that_wait_learn_their_place(model: LoadedModel) -> None:
    steps, engine = stepwise(model, max_songs=1)
    steps.allow(1)
    await finish(engine, song_of(20, steps=1))  # so that the time of a step is known
    first = asyncio.create_task(finish(engine, song_of(20, steps=2, seed=1)))
    await steps.wait_for_step()
    await steps.wait_for_step()
    second, third = (engine.denoise(song_of(20, steps=2, seed=seed)) for seed in (2, 3))
    found = [await anext(second), await anext(third)]
    assert [event.position for event in found if isinstance(event, Queued)] == [0, 1]
    waits = [event.wait_s for event in found if isinstance(event, Queued)]
    assert waits[1] == pytest.approx(2 * waits[0])
    assert waits[0] > 0
    assert (engine.num_songs, engine.num_waiting) == (1, 2)
    await second.aclose()
    moved = await anext(third)
    assert isinstance(moved, Queued)
    assert moved.position == 0
    steps.allow(100)
    await first
    *rest, latents = [event async for event in third]
    assert rest == [1, 2]
    assert isinstance(latents, np.ndarray)
    engine.close()


async def test_one_song_more_than_may_wait_is_refused(model: LoadedModel) -> None:
    steps, engine = stepwise(model, max_songs=1, max_waiting=1)
    tasks = [asyncio.create_task(finish(engine, song_of(20, steps=1, seed=seed))) for seed in (1, 2)]
    await steps.wait_for_step()
    with pytest.raises(OverloadedError, match="1 songs are under way and 1 wait"):
        await finish(engine, song_of(20, steps=1, seed=3))
    steps.allow(100)
    await asyncio.gather(*tasks)
    engine.close()


async def test_songs_wait_for_memory_and_one_that_never_fits_is_refused(model: LoadedModel) -> None:
    song = song_of(400, steps=2)
    size_bytes = estimate_bytes(song, model)
    steps, engine = stepwise(model, max_songs_gb=1.5 * size_bytes / 1e9)
    with pytest.raises(SongTooLargeError, match=r"a song of 4000 latent frames .* max_songs_gb is"):
        await finish(engine, song_of(4000, steps=2))
    tasks = [asyncio.create_task(finish(engine, song)) for _ in range(3)]
    steps.allow(100)
    await asyncio.gather(*tasks)
    engine.close()
    assert steps.batches == [1] * 6


async def test_the_memory_of_a_song_is_no_more_than_estimated(model: LoadedModel) -> None:
    song = replace(
        song_of(300, steps=2), diffusion=Diffusion(times=tuple(schedule(2, 3.0)), guidance=Guidance(scale=3.0))
    )
    steps = Watched(model.dit)
    engine = DitEngine([replace(model, dit=cast(Dit, steps))], Worker("dit"))
    events = engine.denoise(song)
    first = asyncio.create_task(anext(events))
    await steps.wait_for_step()
    steps.allow(1)
    await first
    held = {id(tensor): tensor.nbytes for tensor in (each() for each in steps.seen[300]) if tensor is not None}
    assert 0 < sum(held.values()) <= estimate_bytes(song, model)
    await events.aclose()
    steps.allow(100)
    engine.close()
