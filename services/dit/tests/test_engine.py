"""Batching: songs that share steps never change one another, come and go, and fail alone."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from soundstage_dit.engine import DenoiseError, DitEngine
from soundstage_dit.model.adapter import Adaptation
from soundstage_dit.model.dit import Dit
from soundstage_dit.sampler import schedule
from soundstage_dit.song import Diffusion, Song
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.worker import Worker

# One matrix product over another number of rows adds in another order.
TOLERANCE = 1e-5

words = st.text(alphabet="abc ,\nあ", max_size=60)


@st.composite
def songs(draw: st.DrawFn) -> Song:
    """Any small song."""
    frames = draw(st.integers(1, 90))
    return Song(
        caption=draw(words),
        lyrics=draw(words),
        num_frames=frames,
        seed=draw(st.integers(0, 2**32 - 1)),
        codes=tuple(draw(st.lists(st.integers(0, 63_999), max_size=-(-frames // 5)))),
        diffusion=Diffusion(times=tuple(schedule(draw(st.integers(1, 4)), draw(st.floats(1, 5))))),
    )


class Stepwise:
    """A transformer that waits for leave before every step, and records how many songs each step had."""

    def __init__(self, dit: Dit) -> None:
        self.remember = dit.remember
        self.shape = dit.shape
        self.batches: list[int] = []
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
        self._entered.release()
        self._leave.acquire()
        if self.failures:
            raise self.failures.pop()
        return self._dit(latents, times, contexts, memories, adaptations)


def stepwise(model: LoadedModel, *, max_batch: int = 4) -> tuple[Stepwise, DitEngine]:
    """An engine whose steps a test lets through."""
    steps = Stepwise(model.dit)
    return steps, DitEngine(replace(model, dit=cast(Dit, steps)), Worker("dit"), max_batch=max_batch)


async def finish(engine: DitEngine, song: Song) -> NDArray[np.float32]:
    """Denoise to the end; checks the progress on the way."""
    *steps, latents = [event async for event in engine.denoise(song)]
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


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mix=st.lists(songs(), min_size=2, max_size=5), max_batch=st.integers(2, 5))
def test_a_song_in_a_batch_equals_the_song_alone(model: LoadedModel, mix: list[Song], max_batch: int) -> None:
    async def compare() -> None:
        engine = DitEngine(model, Worker("dit"), max_batch=max_batch)
        together = await asyncio.gather(*(finish(engine, song) for song in mix))
        alone = [await finish(engine, song) for song in mix]
        assert engine.num_songs == 0
        engine.close()
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)

    asyncio.run(compare())


@torch.inference_mode()
def test_a_short_song_beside_a_long_one_is_not_touched_by_it(model: LoadedModel) -> None:
    source = torch.Generator().manual_seed(0)
    lengths, conditions = (3, 500), (4, 90)
    latents = [torch.randn(length, 64, generator=source) for length in lengths]
    contexts = [torch.randn(length, 128, generator=source) for length in lengths]
    memories = [model.dit.remember(torch.randn(count, 64, generator=source)) for count in conditions]
    times = torch.tensor([0.9, 0.3])
    together = model.dit(latents, times, contexts, memories)[0]
    poisoned = [contexts[0], torch.full_like(contexts[1], torch.nan)]
    assert torch.equal(model.dit(latents, times, poisoned, memories)[0], together)
    alone = model.dit(latents[:1], times[:1], contexts[:1], memories[:1])[0]
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
        np.testing.assert_allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)


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
    np.testing.assert_allclose(latents, alone, atol=TOLERANCE, rtol=TOLERANCE)


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


async def test_latents_that_are_not_finite_are_an_error(model: LoadedModel) -> None:
    class Diverging(Stepwise):
        def __call__(
            self, latents: Sequence[Tensor], times: Tensor, contexts: Sequence[Tensor], memories: Sequence[Tensor]
        ) -> list[Tensor]:
            return [torch.full_like(song, torch.nan) for song in latents]

    engine = DitEngine(replace(model, dit=cast(Dit, Diverging(model.dit))), Worker("dit"), max_batch=1)
    with pytest.raises(DenoiseError, match="not finite"):
        await finish(engine, song_of(4, steps=1))
    engine.close()
