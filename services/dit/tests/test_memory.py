"""Steps that run out of memory: the songs of a step take it one by one, and only one too large by itself fails."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import grpc
import numpy as np
import pytest
import torch
from torch import Tensor

from soundstage_device.worker import DeviceMemoryError, DeviceWorker
from soundstage_dit.engine import DitEngine
from soundstage_dit.model.dit import Dit
from soundstage_dit.weights import LoadedModel

from .test_engine import Stepwise, finish, song_of


class Small(Stepwise):
    """A transformer on a device that has no room for more than so many frames at once."""

    def __init__(self, dit: Dit, *, room: int) -> None:
        super().__init__(dit)
        self.room = room
        self.allow(1000)

    def __call__(self, latents: Sequence[Tensor], *others: object) -> list[Tensor]:
        if sum(map(len, latents)) > self.room:
            self.failures.append(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        return super().__call__(latents, *others)  # pyright: ignore[reportArgumentType]


def on_small_device(model: LoadedModel, *, room: int, max_tokens: int = 600) -> tuple[Small, DitEngine]:
    dit = Small(model.dit, room=room)
    return dit, DitEngine([replace(model, dit=cast(Dit, dit))], DeviceWorker("dit"), max_tokens=max_tokens)


async def test_songs_that_do_not_fit_together_take_the_step_one_by_one(model: LoadedModel) -> None:
    songs = [song_of(40, steps=4, seed=seed) for seed in range(3)]
    alone = DitEngine([model], DeviceWorker("dit"))
    expected = [await finish(alone, song) for song in songs]
    alone.close()
    dit, engine = on_small_device(model, room=100)
    found = await asyncio.gather(*(finish(engine, song) for song in songs))
    engine.close()
    assert all(np.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))
    # A step of three that failed, and each of them; steps of half the size from then on.
    assert dit.batches == [3] + [1] * 12


async def test_steps_grow_again_when_there_is_memory(model: LoadedModel) -> None:
    dit, engine = on_small_device(model, room=100, max_tokens=60)
    songs = [song_of(40, steps=60, seed=seed) for seed in range(3)]
    made = [asyncio.create_task(finish(engine, song)) for song in songs]
    for _ in range(6):
        await dit.wait_for_step()
    dit.room = 1000
    await asyncio.gather(*made)
    engine.close()
    assert dit.batches[:6] == [3] + [1] * 5
    assert 3 in dit.batches[6:]


async def test_a_song_too_large_by_itself_fails_alone_and_the_engine_lives(model: LoadedModel) -> None:
    _, engine = on_small_device(model, room=100)
    small, large = song_of(40, steps=3), song_of(200, steps=3)
    found, failure, also = await asyncio.gather(
        finish(engine, small), finish(engine, large), finish(engine, small), return_exceptions=True
    )
    assert isinstance(failure, DeviceMemoryError)
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    for latents in (found, also):
        assert isinstance(latents, np.ndarray)
        assert latents.shape == (40, 64)
    assert engine.num_songs == 0
    assert (await finish(engine, song_of(100, steps=1))).shape == (100, 64)
    engine.close()


async def test_a_song_that_leaves_in_a_step_that_fails_is_dropped(model: LoadedModel) -> None:
    dit = Stepwise(model.dit)
    engine = DitEngine([replace(model, dit=cast(Dit, dit))], DeviceWorker("dit"))
    leaving, staying = engine.denoise(song_of(40, steps=2)), engine.denoise(song_of(40, steps=2, seed=1))
    left, stayed = asyncio.create_task(anext(leaving)), asyncio.create_task(anext(staying))
    dit.failures.append(torch.OutOfMemoryError("CUDA out of memory"))
    await dit.wait_for_step()
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    await leaving.aclose()
    dit.allow(100)
    assert await stayed == 1
    assert [event async for event in staying][0] == 2  # noqa: RUF015
    engine.close()
    assert dit.batches == [2, 1, 1]


async def test_a_song_that_runs_out_of_memory_between_steps_is_told_so(model: LoadedModel) -> None:
    class Full(Stepwise):
        def __init__(self, dit: Dit) -> None:
            super().__init__(dit)
            self.remember = self.run_out

        def run_out(self, *_: object) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = DitEngine([replace(model, dit=cast(Dit, Full(model.dit)))], DeviceWorker("dit"))
    with pytest.raises(DeviceMemoryError, match="no memory left for this song just now"):
        await finish(engine, song_of(40, steps=1))
    engine.close()
