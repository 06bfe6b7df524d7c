"""ComposerService over real gRPC, with stages that need no model."""

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from soundstage.music.v1.composer_service_pb2 import (
    DescribeAudioRequest,
    DescribeAudioSetup,
    DraftSongRequest,
    PlanSongRequest,
    PlanSongResponse,
    PolishSongRequest,
)
from soundstage.music.v1.composer_service_pb2_grpc import (
    ComposerServiceStub,
    add_ComposerServiceServicer_to_server,
)
from soundstage.type.v1.audio_pb2 import AudioChunk
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_gateway.composer_servicer import ComposerServicer
from soundstage_gateway.stages import Stages, Targets
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import read_details
from soundstage_runtime.serve import Server, Service

from .conftest import Broken, Deploy, Deployment, Stuck


def idea(**changes: Any) -> PlanSongRequest:
    fields: dict[str, Any] = {"caption": "a calm piano", "metadata": {"duration_s": 2}, "seed": 7}
    return PlanSongRequest(**fields | changes)


async def plan(deployment: Deployment, request: PlanSongRequest) -> list[PlanSongResponse]:
    return [event async for event in ComposerServiceStub(deployment.channel).PlanSong(request)]


def audio(frame_count: int, **setup: Any) -> Iterator[DescribeAudioRequest]:
    """Silence of a length, cut unevenly."""
    yield DescribeAudioRequest(setup=DescribeAudioSetup(frame_count=frame_count, **setup))
    for first in range(0, frame_count, 7000):
        count = min(7000, frame_count - first)
        yield DescribeAudioRequest(audio=AudioChunk(first_frame=first, frame_count=count, data=bytes(count * 4)))


def bad_fields(error: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> list[str]:
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return [violation.field for violation in read_details(error.value).violations]


async def test_a_plan_streams_its_fields_then_itself_then_its_codes(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await plan(deployment, idea())
    assert [event.WhichOneof("event") for event in events] == ["started", "field", "plan", "codes", "codes"]
    assert events[0].started.seed == 7
    assert events[2].plan.caption == "rewritten: a calm piano"
    assert [code for event in events for code in event.codes.codes] == list(range(7, 17))


async def test_a_plan_without_codes_ends_with_itself(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await plan(deployment, idea(write_codes=False))
    assert events[-1].plan.code_count == 0


async def test_a_draft_and_a_polished_text_come_back_with_their_seed(deploy: Deploy) -> None:
    async with deploy() as deployment:
        composer = ComposerServiceStub(deployment.channel)
        draft = await composer.DraftSong(DraftSongRequest(query="rain", vocal_language="fr", seed=3))
        request = PolishSongRequest(caption="rain", metadata=SongMetadata(key_scale="Am"), seed=4)
        polished = await composer.PolishSong(request)
        asked = deployment.stages["lm"].requests
    assert (draft.text.caption, draft.text.genres, draft.seed) == ("RAIN", "pop", 3)
    assert (asked[0].vocal_language, asked[0].seed) == ("fr", 3)
    assert (polished.text.caption, polished.text.metadata.key_scale, polished.seed) == ("RAIN", "A minor", 4)


async def test_audio_is_encoded_tokenized_and_understood(deploy: Deploy) -> None:
    async with deploy() as deployment:
        answer = await ComposerServiceStub(deployment.channel).DescribeAudio(audio(48_000))
        asked = {name: stage.requests[0] for name, stage in deployment.stages.items()}
    assert asked["vae"].frame_count == 48_000
    assert asked["dit"].latent_frames == 25
    assert list(answer.codes) == [0, 5, 10, 15, 20] == list(asked["lm"].codes)
    assert answer.text.caption == "5 codes"


async def test_codes_are_understood_without_audio(deploy: Deploy) -> None:
    async with deploy() as deployment:
        setup = DescribeAudioRequest(setup=DescribeAudioSetup(codes=[1, 2, 3]))
        answer = await ComposerServiceStub(deployment.channel).DescribeAudio(iter([setup]))
        assert deployment.stages["vae"].requests == []
    assert answer.text.caption == "3 codes"


async def test_bad_fields_are_named(deploy: Deploy) -> None:
    async with deploy() as deployment:
        composer = ComposerServiceStub(deployment.channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await plan(deployment, idea(caption="<think>", metadata={"bpm": 5}, planner={"enabled": False}))
        assert bad_fields(error) == ["caption", "metadata.bpm", "planner.enabled"]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await composer.DraftSong(DraftSongRequest(query="x" * 2049, vocal_language="xx"))
        assert bad_fields(error) == ["query", "vocal_language"]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await composer.PolishSong(PolishSongRequest())
        assert bad_fields(error) == ["caption"]
        for setup in (DescribeAudioSetup(frame_count=10), DescribeAudioSetup(frame_count=48_000, codes=[1])):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await composer.DescribeAudio(iter([DescribeAudioRequest(setup=setup)]))
            assert bad_fields(error) == ["setup.frame_count"]


@pytest.mark.parametrize("seconds", [1, 20, 60])
async def test_a_refusal_reaches_a_client_that_is_still_sending(deploy: Deploy, seconds: int) -> None:
    async with deploy() as deployment:
        without_setup = iter(list(audio(48_000 * seconds))[1:])
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ComposerServiceStub(deployment.channel).DescribeAudio(without_setup)
    assert bad_fields(error) == ["setup"]


@pytest.mark.parametrize("name", ["lm", "dit", "vae"])
async def test_a_bug_in_a_stage_is_told_by_the_stages_name(deploy: Deploy, name: str) -> None:
    async with deploy(Broken(name)) as deployment:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ComposerServiceStub(deployment.channel).DescribeAudio(audio(48_000))
    assert error.value.code() is grpc.StatusCode.INTERNAL
    assert read_details(error.value).metadata["stage"] == name


@pytest.mark.parametrize("name", ["lm", "dit", "vae"])
async def test_cancel_reaches_the_stage_at_work(deploy: Deploy, name: str) -> None:
    stuck = Stuck(name)
    async with deploy(stuck) as deployment:
        call = ComposerServiceStub(deployment.channel).DescribeAudio(audio(48_000))
        async with asyncio.timeout(10):
            await stuck.begun.wait()
            call.cancel()
            await stuck.cancelled.wait()


async def test_a_client_that_never_says_what_to_describe_loses_its_place() -> None:
    admission = Admission("songs", limit=1)
    stages = Stages(Targets(lm="127.0.0.1:1", dit="127.0.0.1:1", vae="127.0.0.1:1"))
    composer = ComposerServicer(stages, admission, idle_timeout_s=0.2)
    service = Service(name="composer", add=lambda server: add_ComposerServiceServicer_to_server(composer, server))
    async with Server([service]) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        silent, refused = (ComposerServiceStub(channel).DescribeAudio() for _ in range(2))
        codes = {await call.code() for call in (refused, silent)}
    await stages.close()
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert admission.in_flight == 0


async def test_planning_takes_a_place_as_songs_do(deploy: Deploy) -> None:
    async with deploy(Stuck("lm"), max_songs=1) as deployment:
        call = ComposerServiceStub(deployment.channel).PlanSong(idea())
        await anext(aiter(call))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await plan(deployment, idea())
        call.cancel()
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
