"""Ids and deadlines over two real hops."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
import structlog

from soundstage.stage.v1.stage_service_pb2 import DescribeRequest, DescribeResponse
from soundstage.stage.v1.stage_service_pb2_grpc import (
    StageServiceServicer,
    StageServiceStub,
    add_StageServiceServicer_to_server,
)
from soundstage_runtime.call import REQUEST_ID_KEY, SONG_KEY, name_song, next_hop
from soundstage_runtime.serve import Server, Service

Context = grpc.aio.ServicerContext[Any, Any]


class Back(StageServiceServicer):
    """Notes what reaches the second hop."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.remaining_s: float | None = None
        self.logged: dict[str, Any] = {}

    async def Describe(self, request: DescribeRequest, context: Context) -> DescribeResponse:
        self.metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
        self.remaining_s = context.time_remaining()
        self.logged = structlog.contextvars.get_contextvars()
        return DescribeResponse(stage="back")


class Front(StageServiceServicer):
    """Asks the back, for a song if it is given one."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._back = StageServiceStub(channel)
        self.song = ""

    async def Describe(self, request: DescribeRequest, context: Context) -> DescribeResponse:
        if self.song:
            name_song(self.song)
        hop = next_hop()
        return await self._back.Describe(request, timeout=hop.timeout_s, metadata=hop.metadata)


class Hops:
    """A channel to the front, and both servicers."""

    def __init__(self, channel: grpc.aio.Channel, front: Front, back: Back) -> None:
        self.stub = StageServiceStub(channel)
        self.front, self.back = front, back


def offer(servicer: StageServiceServicer) -> list[Service]:
    name = "soundstage.stage.v1.StageService"
    return [Service(name=name, add=lambda server: add_StageServiceServicer_to_server(servicer, server))]


@asynccontextmanager
async def connect(server: Server) -> AsyncGenerator[grpc.aio.Channel]:
    async with server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture
async def hops() -> AsyncGenerator[Hops]:
    back = Back()
    async with connect(Server(offer(back))) as to_back:
        front = Front(to_back)
        async with connect(Server(offer(front))) as to_front:
            yield Hops(to_front, front, back)


async def test_the_ids_reach_the_next_hop_and_its_logs(hops: Hops) -> None:
    await hops.stub.Describe(DescribeRequest(), metadata=((REQUEST_ID_KEY, "r-1"), (SONG_KEY, "songs/1")))
    assert hops.back.metadata[REQUEST_ID_KEY] == "r-1"
    assert hops.back.metadata[SONG_KEY] == "songs/1"
    assert hops.back.logged == {"request_id": "r-1", "song": "songs/1"}


async def test_a_song_named_on_the_way_goes_along(hops: Hops) -> None:
    hops.front.song = "songs/2"
    await hops.stub.Describe(DescribeRequest(), metadata=((REQUEST_ID_KEY, "r-2"),))
    assert hops.back.metadata[REQUEST_ID_KEY] == "r-2"
    assert hops.back.metadata[SONG_KEY] == "songs/2"


async def test_a_call_without_an_id_is_given_one_of_its_own(hops: Hops) -> None:
    seen: set[str] = set()
    for _ in range(3):
        await hops.stub.Describe(DescribeRequest())
        seen.add(hops.back.metadata[REQUEST_ID_KEY])
        assert SONG_KEY not in hops.back.metadata
    assert len(seen) == 3


async def test_what_is_not_ours_does_not_travel(hops: Hops) -> None:
    await hops.stub.Describe(DescribeRequest(), metadata=(("authorization", "secret"), ("x-other", "1")))
    assert not {"authorization", "x-other"} & hops.back.metadata.keys()


async def test_the_deadline_reaches_the_next_hop_with_a_margin_off(hops: Hops) -> None:
    await hops.stub.Describe(DescribeRequest(), timeout=0.9)
    assert hops.back.remaining_s is not None
    assert 0 < hops.back.remaining_s < 0.885  # the margin is 0.02 s; longer deadlines gRPC rounds up by as much


async def test_no_deadline_stays_no_deadline(hops: Hops) -> None:
    await hops.stub.Describe(DescribeRequest())
    assert hops.back.remaining_s is None


def test_outside_a_call_there_is_nothing_to_pass_on() -> None:
    assert next_hop().timeout_s is None
    assert next_hop().metadata == ()
