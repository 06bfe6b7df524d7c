"""The life of a process, through its real port."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from soundstage.stage.v1.lm_service_pb2 import (
    ComposeRequest,
    ComposeResponse,
    DraftRequest,
    DraftResponse,
    PolishRequest,
    PolishResponse,
    ScoreRequest,
    ScoreResponse,
    UnderstandRequest,
    UnderstandResponse,
)
from soundstage.stage.v1.lm_service_pb2_grpc import (
    LmServiceServicer,
    LmServiceStub,
    add_LmServiceServicer_to_server,
)
from soundstage_runtime.errors import ServiceError, read_details
from soundstage_runtime.serve import LostError, PortTakenError, Server, Service, WarmUpError, serve
from soundstage_runtime.settings import ServerSettings, load_settings

NAME = "soundstage.stage.v1.LmService"
Context = grpc.aio.ServicerContext[Any, Any]


class Slow(LmServiceServicer):
    """Answers once, and again when it is let go; fails after that if it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.let_go = asyncio.Event()
        self.is_closed = False
        self._error = error

    async def Compose(self, request: ComposeRequest, context: Context) -> AsyncIterator[ComposeResponse]:
        try:
            yield ComposeResponse()
            await self.let_go.wait()
            if self._error:
                raise self._error
            yield ComposeResponse()
        finally:
            self.is_closed = True

    # Nobody asks for these; the service has them.
    async def Understand(self, request: UnderstandRequest, context: Context) -> UnderstandResponse:
        return UnderstandResponse()

    async def Draft(self, request: DraftRequest, context: Context) -> DraftResponse:
        return DraftResponse()

    async def Polish(self, request: PolishRequest, context: Context) -> PolishResponse:
        return PolishResponse()

    async def Score(self, request: ScoreRequest, context: Context) -> ScoreResponse:
        return ScoreResponse()


def offer(servicer: LmServiceServicer) -> list[Service]:
    return [Service(name=NAME, add=lambda server: add_LmServiceServicer_to_server(servicer, server))]


def dial(server: Server) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")


async def ask_health(channel: grpc.aio.Channel) -> list[int]:
    """The status of the whole, and of the service."""
    health: Any = HealthStub(channel)  # its stubs are untyped
    return [(await health.Check(HealthCheckRequest(service=name))).status for name in ("", NAME)]


async def test_serving_is_said_only_after_the_warm_up_went_through() -> None:
    seen: list[list[int]] = []
    answers = 0

    async def warm_up(channel: grpc.aio.Channel) -> None:
        nonlocal answers
        seen.append(await ask_health(channel))
        call = LmServiceStub(channel).Compose(ComposeRequest())
        await anext(aiter(call))
        answers += 1

    server = Server(offer(Slow()), warm_up=warm_up)
    async with server, dial(server) as channel:
        seen.append(await ask_health(channel))
    assert answers == 1
    assert seen == [[HealthCheckResponse.NOT_SERVING] * 2, [HealthCheckResponse.SERVING] * 2]


async def test_a_failed_warm_up_never_says_serving() -> None:
    async def warm_up(channel: grpc.aio.Channel) -> None:
        raise RuntimeError("no weights")

    server = Server(offer(Slow()), warm_up=warm_up)
    with pytest.raises(RuntimeError, match="no weights"):
        await server.start()
    async with dial(server) as channel:
        assert await ask_health(channel) == [HealthCheckResponse.NOT_SERVING] * 2
    await server.stop()


async def test_a_draining_server_says_not_serving_and_lets_an_open_stream_finish() -> None:
    slow = Slow()
    server = Server(offer(slow))
    await server.start()
    async with dial(server) as channel, dial(server) as watcher:
        call = LmServiceStub(channel).Compose(ComposeRequest())
        responses = aiter(call)
        await anext(responses)
        watch: Any = cast(Any, HealthStub(watcher)).Watch(HealthCheckRequest(service=NAME))
        health = aiter(watch)
        assert (await anext(health)).status == HealthCheckResponse.SERVING
        stopping = asyncio.create_task(server.stop(drain_s=0.2, grace_s=20))
        assert (await anext(health)).status == HealthCheckResponse.NOT_SERVING
        assert not slow.is_closed
        slow.let_go.set()
        assert await anext(responses) == ComposeResponse()
        assert await call.code() is grpc.StatusCode.OK
        async with asyncio.timeout(5):  # the watch is still open, and does not hold the server for its grace
            await stopping
    assert slow.is_closed


async def test_a_stopping_server_refuses_new_calls_with_a_reason() -> None:
    slow = Slow()
    server = Server(offer(slow))
    await server.start()
    async with dial(server) as channel:
        responses = aiter(LmServiceStub(channel).Compose(ComposeRequest()))
        await anext(responses)
        stopping = asyncio.create_task(server.stop(grace_s=20))
        async with asyncio.timeout(10):
            while True:
                try:
                    await anext(aiter(LmServiceStub(channel).Compose(ComposeRequest())))
                except grpc.aio.AioRpcError as error:
                    refusal = error
                    break
        slow.let_go.set()
        await anext(responses)
        await stopping
    assert refusal.code() is grpc.StatusCode.UNAVAILABLE
    assert read_details(refusal).reason == "CLOSING"


async def test_a_stream_longer_than_the_grace_is_cut() -> None:
    slow = Slow()
    server = Server(offer(slow))
    await server.start()
    async with dial(server) as channel:
        call = LmServiceStub(channel).Compose(ComposeRequest())
        responses = aiter(call)
        await anext(responses)
        await server.stop(grace_s=0.1)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await anext(responses)
    assert slow.is_closed


async def test_a_port_that_is_taken_is_a_clear_error() -> None:
    async with Server(offer(Slow())) as first:
        with pytest.raises(PortTakenError, match=rf"cannot listen on 127\.0\.0\.1:{first.port}: the port is taken"):
            await Server(offer(Slow()), port=first.port).start()


async def test_reflection_lists_the_services() -> None:
    server = Server(offer(Slow()))
    async with server, dial(server) as channel:
        requests = iter([ServerReflectionRequest(list_services="")])
        reflection = cast(Any, ServerReflectionStub)(channel)
        response = await anext(aiter(reflection.ServerReflectionInfo(requests)))
    names = {service.name for service in response.list_services_response.service}
    assert {NAME, "grpc.health.v1.Health"} <= names


async def test_an_unforeseen_error_in_a_stream_is_internal_after_what_was_sent() -> None:
    slow = Slow(error=KeyError("secret"))
    slow.let_go.set()
    server = Server(offer(slow))
    async with server, dial(server) as channel:
        responses = aiter(LmServiceStub(channel).Compose(ComposeRequest()))
        await anext(responses)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(responses)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert read_details(caught.value).reason == "INTERNAL"
    told = f"{caught.value.details()} {caught.value.trailing_metadata()!r}"
    assert "secret" not in told
    assert "Traceback" not in told


async def test_bytes_that_are_no_request_are_refused_as_any_bad_request_is() -> None:
    server = Server(offer(Slow()))
    async with server, dial(server) as channel:
        for data in (b"\xff\xff\xff", b"\x0a\x02\xff\xfe"):  # garbage, and a text that is not UTF-8
            call = channel.unary_stream(f"/{NAME}/Compose")(data)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(call))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert [violation.field for violation in read_details(caught.value).violations] == ["request"]


async def test_a_warm_up_that_is_refused_says_why_in_a_line() -> None:
    async def warm_up(channel: grpc.aio.Channel) -> None:
        responses = aiter(LmServiceStub(channel).Compose(ComposeRequest()))
        await anext(responses)
        await anext(responses)

    slow = Slow(error=ServiceError("the weights are not finite"))
    slow.let_go.set()
    server = Server(offer(slow), warm_up=warm_up)
    with pytest.raises(WarmUpError, match="the warm-up failed: the weights are not finite"):
        await server.start()
    await server.stop()


async def test_a_cancelled_stream_is_closed_at_once() -> None:
    slow = Slow()
    server = Server(offer(slow))
    async with server, dial(server) as channel:
        call = LmServiceStub(channel).Compose(ComposeRequest())
        await anext(aiter(call))
        call.cancel()
        async with asyncio.timeout(10):
            while not slow.is_closed:  # noqa: ASYNC110  it is closed on the far side of the wire
                await asyncio.sleep(0.005)


PROCESS = """
import asyncio
from soundstage_runtime.logs import configure
from soundstage_runtime.serve import serve
from soundstage_runtime.settings import ServerSettings

async def warm_up(channel):
    await channel.channel_ready()

configure("probe", log_format="json", log_level="info")
asyncio.run(serve(ServerSettings(), [], warm_up=warm_up))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_told_to_stop_drains_and_leaves_with_success(number: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROCESS, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    events: list[str] = []
    async with asyncio.timeout(60):
        async for line in process.stderr:
            events += [event for event in ("ready", "draining", "stopped") if f'"event": "{event}"' in line.decode()]
            if events == ["ready"]:
                process.send_signal(number)
    assert events == ["ready", "draining", "stopped"]
    assert await process.wait() == 0


async def test_a_process_that_loses_what_it_serves_with_ends() -> None:
    gone = asyncio.Event()

    async def warm_up(channel: grpc.aio.Channel) -> None:
        gone.set()

    async def lost() -> str:
        await gone.wait()
        return "the engine has died"

    with pytest.raises(LostError, match="the engine has died"):
        await serve(load_settings(ServerSettings, []), [], warm_up=warm_up, lost=lost)
