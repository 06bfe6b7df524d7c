"""A song's events reach whoever follows them, whenever they come."""

import asyncio

import pytest

from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, GenerateSongResponse, Plan, Progress, Stage
from soundstage_gateway.log import Log
from soundstage_runtime.errors import ServiceError


def progress(done: int, *, stage: Stage.ValueType = STAGE_DIT, variant: int = 0) -> GenerateSongResponse:
    return GenerateSongResponse(variant=variant, progress=Progress(stage=stage, done=done, total=9))


async def read(log: Log, after: int | None = None) -> list[GenerateSongResponse]:
    return [event async for event in log.follow(after)]


async def test_followers_get_what_was_and_what_comes_in_order() -> None:
    log = Log()
    log.append(progress(1))
    early = asyncio.create_task(read(log))
    await asyncio.sleep(0)
    log.append(progress(2))
    await asyncio.sleep(0)
    log.append(progress(3))
    log.close()
    assert [event.progress.done for event in await early] == [1, 2, 3]
    assert [event.progress.done for event in await read(log)] == [1, 2, 3]
    assert [event.sequence for event in await read(log, after=0)] == [1, 2]
    assert await read(log, after=2) == []


async def test_a_number_of_a_longer_log_of_before_is_followed_from_the_start() -> None:
    log = Log()
    early = asyncio.create_task(read(log, after=7))
    await asyncio.sleep(0)
    log.append(progress(1))
    late = asyncio.create_task(read(log, after=7))
    await asyncio.sleep(0)
    log.append(progress(2))
    log.close()
    for events in (await early, await late, await read(log, after=2)):
        assert [event.progress.done for event in events] == [1, 2]
    assert await read(log, after=1) == []


async def test_a_failed_song_tells_its_events_and_then_its_error() -> None:
    log = Log()
    log.append(progress(1))
    log.close(ServiceError("broken"))
    events = log.follow()
    assert (await anext(events)).progress.done == 1
    with pytest.raises(ServiceError, match="broken"):
        await anext(events)


async def test_a_long_log_keeps_the_last_progress_of_each_stage_and_variant_and_all_else() -> None:
    log = Log()
    log.append(GenerateSongResponse(plan=Plan(code_count=7)))
    for done in range(1000):
        log.append(progress(done))
        log.append(progress(done, stage=STAGE_LM))
        log.append(progress(done, variant=1))
    assert len(log.events) < 300
    assert log.events[0].plan.code_count == 7
    assert [event.progress.done for event in log.events[-3:]] == [999, 999, 999]
    sequences = [event.sequence for event in log.events]
    assert sequences == sorted(set(sequences))
