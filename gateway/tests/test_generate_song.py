"""GenerateSong over real gRPC, with stages that need no model."""

import asyncio
import hashlib
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_LM,
    STAGE_VAE,
    GenerateSongRequest,
    GenerateSongResponse,
    WatchSongRequest,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32
from soundstage.type.v1.score_pb2 import ORIGIN_LM
from soundstage_runtime.errors import read_details

from .conftest import Broken, Deploy, Deployment, Steady, Stuck, serve_stage


def song(**changes: Any) -> GenerateSongRequest:
    fields: dict[str, Any] = {"caption": "a calm piano", "metadata": {"duration_s": 4}, "seeds": [7]}
    return GenerateSongRequest(**fields | changes)


async def collect(deployment: Deployment, request: GenerateSongRequest, **options: Any) -> list[GenerateSongResponse]:
    return [event async for event in SongServiceStub(deployment.channel).GenerateSong(request, **options)]


async def fail(deployment: Deployment, request: GenerateSongRequest, **options: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(deployment, request, **options)
    return caught.value


def kinds(events: list[GenerateSongResponse]) -> list[str]:
    found = [str(event.WhichOneof("event")) for event in events]
    return [kind for index, kind in enumerate(found) if index == 0 or found[index - 1] != kind]


async def test_events_come_in_the_promised_order(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await collect(deployment, song())
    assert kinds(events) == [
        "accepted",
        "plan",
        "progress",
        "queued",
        "progress",
        "audio_header",
        "audio_chunk",
        "completed",
    ]
    progress = [(e.progress.stage, e.progress.done, e.progress.total) for e in events if e.HasField("progress")]
    assert progress == [(STAGE_LM, done, 20) for done in (5, 10, 15, 20)] + [(STAGE_DIT, s, 3) for s in (1, 2, 3)]


async def test_a_song_is_watched_on_from_any_event_of_its_call_and_none_is_missed_or_told_twice(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await collect(deployment, song())
        name = events[0].accepted.song
        every = await watch(deployment, name)
        rests = {number: await watch(deployment, name, number) for number in {event.sequence for event in events}}
    for index, event in enumerate(events):
        told = [event for event in events[: index + 1] if not str(event.WhichOneof("event")).startswith("audio")]
        joined = told + rests[event.sequence]
        assert [(one.sequence, one.WhichOneof("event")) for one in joined] == [
            (one.sequence, one.WhichOneof("event")) for one in every
        ]


class Second(Steady):
    """A diffusion stage that halts in its second song until it may go on."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.num_begun = 0
        self.may_go_on = asyncio.Event()

    async def between(self) -> None:
        self.num_begun += 1
        if self.num_begun == 2:
            await self.may_go_on.wait()


async def test_a_variant_that_is_still_played_is_completed_for_whoever_watches_on(deploy: Deploy) -> None:
    dit, vae = Second("dit"), Stuck("vae")
    async with deploy(dit, vae) as deployment:
        call = SongServiceStub(deployment.channel).GenerateSong(song(variants=2))
        events: list[GenerateSongResponse] = []
        async for event in call:
            events.append(event)
            if event.HasField("audio_chunk") and not dit.may_go_on.is_set():
                dit.may_go_on.set()  # the first variant halts in its audio, and the second overtakes it
            elif event.HasField("audio_chunk"):
                break
        name, last = events[0].accepted.song, events[-1].sequence
        rest = await watch(deployment, name, last)
        call.cancel()
    audible = [event.variant for event in events if event.HasField("audio_chunk")]
    assert sorted(audible) == [0, 1]
    assert [event.variant for event in rest if event.HasField("completed")] == audible
    assert [event.sequence for event in events] == sorted(event.sequence for event in events)


async def watch(deployment: Deployment, song: str, after: int | None = None) -> list[GenerateSongResponse]:
    call = SongServiceStub(deployment.channel).WatchSong(WatchSongRequest(song=song, after_sequence=after))
    return [response.event async for response in call]


async def test_chunks_join_to_the_song_that_completed_describes(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await collect(deployment, song(output={"format": {"sample_format": SAMPLE_FORMAT_F32}}))
    header = next(event.audio_header for event in events if event.HasField("audio_header"))
    chunks = [event.audio_chunk for event in events if event.HasField("audio_chunk")]
    done = events[-1].completed
    assert header.frame_count == 4 * 48_000 == done.frame_count == sum(chunk.frame_count for chunk in chunks)
    assert [chunk.first_frame for chunk in chunks] == [24_000 * index for index in range(8)]
    pcm = b"".join(chunk.data for chunk in chunks)
    assert done.pcm_sha256 == hashlib.sha256(pcm).digest()
    # The fake stages make latent frame n into samples of n + seed steps of S16.
    steps = (np.arange(100, dtype=np.float32) + 7) / np.float32(32_767)
    assert np.array_equal(np.frombuffer(pcm, "<f4")[:: 1920 * 2], steps)
    assert done.peak == steps[-1]
    assert done.seed == 7
    assert done.metadata.bpm == 120
    assert done.metadata.duration_s == 4
    assert [(timing.stage, timing.model_fingerprint) for timing in done.timings] == [
        (STAGE_LM, "lm-print"),
        (STAGE_DIT, "dit-print"),
        (STAGE_VAE, "vae-print"),
    ]


async def test_stages_are_given_the_seed_the_words_and_the_fingerprint_of_their_model(deploy: Deploy) -> None:
    async with deploy() as deployment:
        await collect(deployment, song(lyrics="la la", diffusion={"steps": 5}))
        asked = {name: stage.requests[0] for name, stage in deployment.stages.items()}
    assert (asked["lm"].seed, asked["lm"].caption, asked["lm"].lyrics) == (7, "a calm piano", "la la")
    assert (asked["dit"].seed, asked["dit"].latent_frames, asked["dit"].options.steps) == (7, 100, 5)
    assert list(asked["dit"].codes) == list(range(7, 27))
    assert {name: request.model_fingerprint for name, request in asked.items()} == {
        name: f"{name}-print" for name in ("lm", "dit", "vae")
    }


async def test_the_planner_decides_the_duration_when_the_request_does_not(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await collect(deployment, GenerateSongRequest(caption="x"))
    assert events[1].plan.metadata.duration_s == 12
    assert events[-1].completed.frame_count == 12 * 48_000


async def test_the_planners_caption_and_fields_are_told_and_its_caption_reaches_the_diffusion(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await collect(deployment, song())
        kept = await collect(deployment, song(planner={"rewrite_caption": False, "detect_language": False}))
        first, second = deployment.stages["dit"].requests
        switched = deployment.stages["lm"].requests[1]
    assert events[1].plan.caption == first.caption == "rewritten: a calm piano"
    assert [(field.name, field.value, field.origin) for field in events[1].plan.fields] == [("bpm", "120", ORIGIN_LM)]
    assert (kept[1].plan.caption, second.caption) == ("", "a calm piano")
    assert (switched.HasField("write_metadata"), switched.rewrite_caption, switched.detect_language) == (
        False,
        False,
        False,
    )


async def test_codes_that_come_with_a_request_are_the_song(deploy: Deploy) -> None:
    codes = list(range(100, 117))
    async with deploy() as deployment:
        events = await collect(deployment, song(codes=codes, metadata={"bpm": 90}))
        asked = deployment.stages["dit"].requests[0]
        assert deployment.stages["lm"].requests == []
    assert (list(asked.codes), asked.latent_frames, asked.metadata.duration_s) == (codes, 85, 3.4)
    assert (events[1].plan.code_count, events[1].plan.metadata.bpm) == (17, 90)
    assert events[-1].completed.frame_count == 85 * 1920


async def test_musicians_spellings_reach_the_stages_as_the_models_spell_them(deploy: Deploy) -> None:
    async with deploy() as deployment:
        await collect(deployment, song(metadata={"key_scale": "Am", "time_signature": "6/8", "duration_s": 2}))
        told = deployment.stages["lm"].requests[0].metadata
    assert (told.key_scale, told.time_signature) == ("A minor", "6")


@pytest.mark.parametrize(("duration_s", "latent_frames"), [(4.44, 111), (1, 25), (7.27, 181), (599.99, 14_999)])
async def test_without_a_planner_the_duration_is_kept_to_the_latent_frame(
    deploy: Deploy, duration_s: float, latent_frames: int
) -> None:
    async with deploy() as deployment:
        request = song(metadata={"duration_s": duration_s}, planner={"enabled": False})
        await collect(deployment, request)
        assert deployment.stages["lm"].requests == []
        assert deployment.stages["dit"].requests[0].latent_frames == latent_frames
        assert deployment.stages["vae"].requests[0].latent_frames == latent_frames


async def test_instrumental_reaches_the_stages_as_the_tag_they_know(deploy: Deploy) -> None:
    async with deploy() as deployment:
        await collect(deployment, song(instrumental=True))
        assert deployment.stages["lm"].requests[0].lyrics == "[Instrumental]"
        assert deployment.stages["dit"].requests[0].lyrics == "[Instrumental]"


async def test_variants_are_whole_songs_with_seeds_of_their_own(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await collect(deployment, song(variants=3, seeds=[7, 8]))
    seeds = list(events[0].accepted.seeds)
    assert seeds[:2] == [7, 8]
    assert len(seeds) == 3
    for variant in range(3):
        own = [event for event in events[1:] if event.variant == variant]
        assert kinds(own) == ["plan", "progress", "queued", "progress", "audio_header", "audio_chunk", "completed"]
        assert own[-1].completed.seed == seeds[variant]
    digests = {event.completed.pcm_sha256 for event in events if event.HasField("completed")}
    assert len(digests) == len({seed % 1000 for seed in seeds})  # which is what the stages here make songs of


async def test_a_song_more_than_the_limit_is_refused_with_a_time_to_come_back(deploy: Deploy) -> None:
    async with deploy(Stuck("dit"), max_songs=2) as deployment:
        call = SongServiceStub(deployment.channel).GenerateSong(song(variants=2))
        await anext(aiter(call))
        error = await fail(deployment, song())
        call.cancel()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = read_details(error)
    assert details.reason == "QUEUE_FULL"
    assert details.retry_after_s is not None
    assert details.retry_after_s > 0


@pytest.mark.parametrize("name", ["lm", "dit", "vae"])
async def test_cancel_reaches_the_stage_at_work_and_frees_the_place(deploy: Deploy, name: str) -> None:
    stuck = Stuck(name)
    async with deploy(stuck, max_songs=1) as deployment:
        call = SongServiceStub(deployment.channel).GenerateSong(song())
        await anext(aiter(call))
        await asyncio.wait_for(stuck.begun.wait(), 5)
        call.cancel()
        await asyncio.wait_for(stuck.cancelled.wait(), 5)
        await place_is_free(deployment)


async def place_is_free(deployment: Deployment) -> None:
    async with asyncio.timeout(5):
        while True:
            call = SongServiceStub(deployment.channel).GenerateSong(song())
            try:
                await anext(aiter(call))
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                continue
            call.cancel()
            return


@pytest.mark.parametrize("name", ["lm", "dit", "vae"])
async def test_the_deadline_travels_to_every_stage_and_ends_the_call(deploy: Deploy, name: str) -> None:
    stuck = Stuck(name)
    async with deploy(stuck) as deployment:
        error = await fail(deployment, song(), timeout=3.0)
        await asyncio.wait_for(stuck.cancelled.wait(), 5)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    [remaining_s] = stuck.remaining_s
    if name == "vae":
        assert remaining_s is None  # it decodes for all listeners of the song, and ends with the last
    else:
        assert remaining_s is not None
        assert 0 < remaining_s < 3.0


async def test_ids_travel_to_every_stage(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await collect(deployment, song(), metadata=(("x-request-id", "mine"),))
        expected = {"x-request-id": "mine", "x-song": events[0].accepted.song}
        assert [stage.metadata[0] for stage in deployment.stages.values()] == [expected] * 3


@pytest.mark.parametrize("name", ["lm", "dit", "vae"])
async def test_a_stage_that_is_away_is_named_and_found_again_when_it_is_back(deploy: Deploy, name: str) -> None:
    async with deploy() as deployment:
        server = deployment.servers[name]
        await collect(deployment, song())
        await server.stop()
        error = await fail(deployment, song())
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        details = read_details(error)
        assert (details.reason, details.metadata["stage"]) == ("STAGE_UNAVAILABLE", name)
        assert details.retry_after_s is not None
        deployment.servers[name] = serve_stage(Steady(name), port=server.port)
        await deployment.servers[name].start()
        async with asyncio.timeout(10):
            while True:
                try:
                    events = await collect(deployment, song())
                    break
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert events[-1].HasField("completed")


@pytest.mark.parametrize("name", ["lm", "dit", "vae"])
async def test_a_stage_that_dies_at_work_ends_the_call_with_unavailable(deploy: Deploy, name: str) -> None:
    stuck = Stuck(name)
    async with deploy(stuck) as deployment:
        call = SongServiceStub(deployment.channel).GenerateSong(song())
        await anext(aiter(call))
        await asyncio.wait_for(stuck.begun.wait(), 5)
        await deployment.servers[name].stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [event async for event in call]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert read_details(caught.value).metadata["stage"] == name


@pytest.mark.parametrize("name", ["lm", "dit", "vae"])
async def test_a_bug_in_a_stage_is_internal_and_tells_no_secrets(deploy: Deploy, name: str) -> None:
    async with deploy(Broken(name)) as deployment:
        error = await fail(deployment, song(variants=2))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert name in str(error.details())
    assert "secret" not in str(error.details())
    assert read_details(error).metadata["stage"] == name


async def test_a_duration_beyond_the_stages_limit_is_refused_with_the_limit(deploy: Deploy) -> None:
    async with deploy(max_duration_s=240) as deployment:
        error = await fail(deployment, song(metadata={"duration_s": 300}))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "must be 1 to 240" in str(error.details())


async def test_more_variants_than_places_are_refused_as_what_can_never_be(deploy: Deploy) -> None:
    async with deploy(max_songs=2) as deployment:
        error = await fail(deployment, song(variants=3))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "variants is 3; must be 1 to 2" in str(error.details())


async def test_a_client_that_stops_reading_loses_its_call_and_its_place(deploy: Deploy) -> None:
    async with deploy(max_songs=1, stall_timeout_s=0.3) as deployment:
        long_song = song(metadata={"duration_s": 600}, output={"format": {"sample_format": SAMPLE_FORMAT_F32}})
        call = SongServiceStub(deployment.channel).GenerateSong(long_song)
        await anext(aiter(call))
        await place_is_free(deployment)
        call.cancel()
