"""Whose tile is next, on a device whose time is simulated: a tile takes as long as its window says."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage_vae.scheduler import Order, Stream, TileScheduler, Window, Work

R = TypeVar("R")


@dataclass
class Clock:
    """Stands still but when a tile is computed."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


class AtOnce:
    """A device that is asked for a batch and has it done within a few turns of the loop, as far as callers see."""

    async def run(self, work: Callable[[], R]) -> R:
        outcome = work()
        for _ in range(5):  # callers that were served come back before the next batch is taken
            await asyncio.sleep(0)
        return outcome


class Stuck:
    """A device that holds its work until it is let go."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def run(self, work: Callable[[], R]) -> R:
        await self.gate.wait()
        return work()


@dataclass
class Timed:
    """Work that takes `tile_s` a batch, and writes down who was in it: a window's first value is its stream."""

    clock: Clock
    tile_s: float
    batches: list[list[int]] = field(default_factory=list[list[int]])

    def __call__(self, windows: Sequence[Window]) -> Sequence[int]:
        self.clock.now_s += self.tile_s
        self.batches.append([int(window[0, 0]) for window in windows])
        return self.batches[-1]


def window(stream: int, frames: int = 4) -> Window:
    return np.full((frames, 64), stream, np.float32)


async def listen(scheduler: TileScheduler, work: Work[int], number: int, tiles: int, audio_s: float) -> list[float]:
    """Play a song of `tiles`; returns how long the listener stood still before each."""
    stream, silences = scheduler.open(), list[float]()
    for _ in range(tiles):
        dry_s = stream.dry_s
        assert await scheduler.run(stream, work, window(number)) == number
        scheduler.hand_on(stream, audio_s)
        silences.append(stream.dry_s - audio_s - dry_s)
    return silences


def make(
    order: Order = "earliest-dry", tile_s: float = 1.0, max_batch: int = 1
) -> tuple[TileScheduler, Timed, Work[int]]:
    clock = Clock()
    timed = Timed(clock, tile_s)
    return (
        TileScheduler(AtOnce(), order=order, clock=clock),
        timed,
        Work(run=timed, batches=dict.fromkeys((4, 8), max_batch)),
    )


def test_a_listener_is_dry_from_its_arrival_until_audio_comes() -> None:
    stream = Stream(10.0)
    assert stream.dry_s == 10.0
    stream.hand_on(2.0, 13.0)
    assert stream.dry_s == 15.0
    stream.hand_on(2.0, 14.0)
    assert stream.dry_s == 17.0


def test_a_listener_who_ran_dry_plays_on_from_when_audio_comes() -> None:
    stream = Stream(0.0)
    stream.hand_on(1.0, 0.0)
    stream.hand_on(1.0, 5.0)
    assert stream.dry_s == 6.0


async def test_who_would_run_dry_first_goes_first() -> None:
    scheduler, timed, work = make()
    streams = [scheduler.open() for _ in range(3)]
    for stream, audio_s in zip(streams, (9.0, 3.0, 6.0), strict=True):
        scheduler.hand_on(stream, audio_s)
    await asyncio.gather(*(scheduler.run(stream, work, window(n)) for n, stream in enumerate(streams)))
    assert timed.batches == [[1], [2], [0]]


async def test_first_come_is_first_served_where_that_is_asked_for() -> None:
    scheduler, timed, work = make("first-come")
    streams = [scheduler.open() for _ in range(3)]
    for stream, audio_s in zip(streams, (9.0, 3.0, 6.0), strict=True):
        scheduler.hand_on(stream, audio_s)
    await asyncio.gather(*(scheduler.run(stream, work, window(n)) for n, stream in enumerate(streams)))
    assert timed.batches == [[0], [1], [2]]


@pytest.mark.parametrize(("order", "waits"), [("earliest-dry", 1), ("first-come", 8)])
async def test_a_newcomer_hears_something_before_others_get_more_than_they_need(order: Order, waits: int) -> None:
    scheduler, timed, work = make(order)
    early = [asyncio.create_task(listen(scheduler, work, number, 6, audio_s=20.0)) for number in range(8)]
    while len(timed.batches) < 20:  # noqa: ASYNC110  the device works in turns of the loop
        await asyncio.sleep(0)
    late = asyncio.create_task(listen(scheduler, work, 8, 1, audio_s=20.0))
    await asyncio.gather(*early, late)
    # The tile in hand is done first; who is first come waits for one of everybody else.
    assert abs(timed.batches.index([8]) - 20 - waits) <= 1


@given(st.integers(1, 6), st.floats(0.05, 0.9))
def test_no_listener_runs_dry_while_the_device_keeps_up(listeners: int, load: float) -> None:
    """A device that makes audio faster than all together play it lets nobody wait but for the first tile."""

    async def simulate() -> None:
        audio_s = 2.0
        scheduler, _, work = make(tile_s=load * audio_s / (listeners + 1))
        silences = await asyncio.gather(*(listen(scheduler, work, n, 12, audio_s) for n in range(listeners)))
        assert all(abs(silence) < 1e-9 for song in silences for silence in song[1:])

    asyncio.run(simulate())


@given(st.lists(st.floats(0.01, 3.0), min_size=2, max_size=6))
def test_nobody_starves_however_overloaded_the_device_is(audio_s: list[float]) -> None:
    """While a stream waits, dry, every other one is served once at most. The last of them encodes."""

    async def simulate() -> None:
        scheduler, timed, work = make(tile_s=5.0)
        await asyncio.gather(
            *(listen(scheduler, work, number, 8, heard_s) for number, heard_s in enumerate([*audio_s, 0.0]))
        )
        served = [batch[0] for batch in timed.batches]
        for number in range(len(audio_s) + 1):
            turns = [turn for turn, who in enumerate(served) if who == number]
            for before, after in pairwise(turns):
                between = served[before + 1 : after]
                assert len(between) == len(set(between))

    asyncio.run(simulate())


async def test_tiles_of_one_shape_and_work_share_a_batch() -> None:
    scheduler, timed, work = make(max_batch=3)
    other = Work(run=timed, batches={4: 3})
    asked = [(work, 4), (work, 8), (other, 4), (work, 4), (work, 4), (work, 4)]
    outcomes = await asyncio.gather(
        *(scheduler.run(scheduler.open(), kind, window(n, frames)) for n, (kind, frames) in enumerate(asked))
    )
    assert timed.batches == [[0, 3, 4], [1], [2], [5]]
    assert outcomes == [0, 1, 2, 3, 4, 5]


async def test_a_failure_in_a_batch_is_one_songs_alone() -> None:
    scheduler = TileScheduler(AtOnce())
    work: Work[int] = Work(run=lambda windows: [1, ValueError("loud"), 3], batches={4: 3})
    outcomes = await asyncio.gather(
        *(scheduler.run(scheduler.open(), work, window(n)) for n in range(3)), return_exceptions=True
    )
    assert (outcomes[0], str(outcomes[1]), outcomes[2]) == (1, "loud", 3)


async def test_the_device_goes_on_after_a_batch_that_failed() -> None:
    scheduler, _, work = make()

    def fail(_windows: Sequence[Window]) -> Sequence[int]:
        raise OSError("the device is gone")

    broken: Work[int] = Work(run=fail)
    failing = asyncio.create_task(scheduler.run(scheduler.open(), broken, window(0)))
    assert await scheduler.run(scheduler.open(), work, window(1)) == 1
    with pytest.raises(OSError, match="the device is gone"):
        await failing


async def test_a_cancelled_streams_tile_is_dropped_and_counted() -> None:
    clock, device = Clock(), Stuck()
    timed = Timed(clock, 1.0)
    scheduler, work = TileScheduler(device, clock=clock), Work(run=timed)
    asked = [asyncio.create_task(scheduler.run(scheduler.open(), work, window(n))) for n in range(3)]
    while scheduler.num_waiting != 2:  # noqa: ASYNC110  the first is with the device
        await asyncio.sleep(0)
    for task in asked[:2]:
        task.cancel()
    await asyncio.gather(*asked[:2], return_exceptions=True)
    assert (scheduler.num_waiting, scheduler.num_dropped) == (1, 1)
    device.gate.set()
    assert await asked[2] == 2
    assert timed.batches == [[0], [2]]
