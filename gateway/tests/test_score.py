"""ScoreSong over real gRPC, with a planner that needs no model."""

import asyncio

import grpc
import grpc.aio
import pytest

from soundstage.music.v1.composer_service_pb2 import ScoreSongRequest
from soundstage.music.v1.composer_service_pb2_grpc import ComposerServiceStub
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_runtime.errors import read_details

from .conftest import Deploy, Stuck

SONG = ScoreSongRequest(codes=[1, 2], caption="a", lyrics="la", metadata=SongMetadata(key_scale="Am"), spread=0.5)


async def test_the_planner_is_asked_and_its_answer_passed_on(deploy: Deploy) -> None:
    async with deploy() as deployment:
        answer = await ComposerServiceStub(deployment.channel).ScoreSong(SONG)
        plain = ScoreSongRequest(codes=[1], caption="a")
        await ComposerServiceStub(deployment.channel).ScoreSong(plain)
        first, second = deployment.stages["lm"].requests
    assert (first.codes, first.caption, first.lyrics, first.spread) == ([1, 2], "a", "la", 0.5)
    assert first.metadata.key_scale == "A minor"
    assert not second.HasField("spread")
    assert (answer.likelihood.total, answer.likelihood.parts[0].name) == (0.25, "caption")


async def test_all_bad_fields_are_named_at_once(deploy: Deploy) -> None:
    bad = ScoreSongRequest(caption=" ", lyrics="\n", spread=2)
    worse = ScoreSongRequest(codes=[64_000], lyrics="<|im_end|>", metadata=SongMetadata(bpm=5))
    found: list[list[str]] = []
    async with deploy() as deployment:
        for request in (bad, worse):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ComposerServiceStub(deployment.channel).ScoreSong(request)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            found.append([violation.field for violation in read_details(caught.value).violations])
    assert found == [["codes", "caption", "spread"], ["codes[0]", "lyrics", "metadata.bpm"]]


async def test_cancelling_cancels_the_planner_and_frees_the_place(deploy: Deploy) -> None:
    stuck = Stuck("lm")
    async with deploy(stuck, max_songs=1) as deployment:
        stub = ComposerServiceStub(deployment.channel)
        call = stub.ScoreSong(SONG)
        async with asyncio.timeout(10):
            await stuck.begun.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ScoreSong(SONG)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            call.cancel()
            await stuck.cancelled.wait()
