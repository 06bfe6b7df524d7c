"""The life of a process: bind, warm up, serve, drain, stop."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Protocol, Self

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from soundstage_runtime.errors import StartError
from soundstage_runtime.interceptor import CallInterceptor, Check, Ended
from soundstage_runtime.settings import ServerSettings

_log = structlog.get_logger()

MAX_MESSAGE_BYTES: Final = 4 << 20
SERVER_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # else two processes share one port without a word
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)
CHANNEL_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A stage that comes back is found again within two seconds, not two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_LAST_ANSWERS_S: Final = 0.5


class PortTakenError(StartError):
    """The address cannot be bound."""


class WarmUpError(StartError):
    """The first request through the port failed, so no other would do better."""


class LostError(StartError):
    """What the process serves with is gone: only a new process helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A gRPC service to offer: its full name, and what adds it to a server."""

    name: str
    add: Callable[[grpc.aio.Server], None]


class Door(Protocol):
    """Another way into the process, beside gRPC."""

    async def open(self) -> None:
        """Let calls in; raises StartError."""
        ...

    async def close(self, *, drain_s: float, grace_s: float) -> None:
        """End as Server.stop does."""
        ...


class Server:
    """Services behind one port, with health and reflection.

    Health is NOT_SERVING, overall and per service, until `warm_up` has gone through the real port. `check` decides who
    may call, and `observe` is told of every call that has ended; health and reflection are open to all.
    """

    def __init__(
        self,
        services: Sequence[Service],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        warm_up: Callable[[grpc.aio.Channel], Awaitable[None]] | None = None,
        check: Check | None = None,
        observe: Callable[[Ended], None] | None = None,
    ) -> None:
        self._services = services
        self._host, self._wanted_port = host, port
        self._warm_up = warm_up
        self._health = HealthServicer()
        self._calls = CallInterceptor(check=check, observe=observe)
        self._server = grpc.aio.server(interceptors=[self._calls], options=SERVER_OPTIONS)
        self.port = 0

    async def start(self) -> None:
        """Bind, warm up, and say SERVING. Raises PortTakenError; a failed warm-up raises what it raised."""
        names = [service.name for service in self._services]
        for service in self._services:
            service.add(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        await self._set_health(serving=False)
        address = f"{self._host}:{self._wanted_port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortTakenError(
                f"cannot listen on {address}: the port is taken or the address not ours ({error})"
            ) from error
        await self._server.start()
        _log.info("listening", host=self._host, port=self.port)
        if self._warm_up is not None:
            local = "127.0.0.1" if self._host in ("0.0.0.0", "[::]") else self._host
            async with grpc.aio.insecure_channel(f"{local}:{self.port}", options=CHANNEL_OPTIONS) as channel:
                try:
                    await self._warm_up(channel)
                except grpc.aio.AioRpcError as error:
                    raise WarmUpError(f"the warm-up failed: {error.details() or error.code().name}") from error
        await self._set_health(serving=True)
        _log.info("ready", port=self.port)

    async def stop(self, *, drain_s: float = 0.0, grace_s: float = 0.0) -> None:
        """Say NOT_SERVING, wait `drain_s` for balancers to see it, then give calls in flight `grace_s` to end."""
        await self._health.enter_graceful_shutdown()
        _log.info("draining", drain_s=drain_s, grace_s=grace_s)
        await asyncio.sleep(drain_s)
        self._calls.refuse()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._calls.wait_until_idle(), grace_s)
        # Not the grace itself: a watcher of health would keep the server for the whole of it.
        await self._server.stop(_LAST_ANSWERS_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        await self.stop()

    async def _set_health(self, *, serving: bool) -> None:
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if serving else response.NOT_SERVING
        for name in ("", *(service.name for service in self._services)):
            await self._health.set(name, status)


async def serve(
    settings: ServerSettings,
    services: Sequence[Service],
    *,
    warm_up: Callable[[grpc.aio.Channel], Awaitable[None]],
    lost: Callable[[], Coroutine[Any, Any, str]] | None = None,
    check: Check | None = None,
    observe: Callable[[Ended], None] | None = None,
    door: Door | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and stop; a `door` opens first, and closes with the server.

    Stops too when `lost` returns, which says what was lost, and raises LostError: whoever started the process starts
    another.
    """
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = Server(services, host=settings.host, port=settings.port, warm_up=warm_up, check=check, observe=observe)

    async def open_all() -> None:
        if door is not None:
            await door.open()
        await server.start()

    start, end = asyncio.create_task(open_all()), asyncio.create_task(ended.wait())
    loss = asyncio.create_task(lost() if lost is not None else asyncio.Event().wait())
    try:
        await asyncio.wait({start, end, loss}, return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await start
            await asyncio.wait({end, loss}, return_when=asyncio.FIRST_COMPLETED)
        if loss.done():
            _log.error("lost", what=loss.result())
            raise LostError(str(loss.result()))
    finally:
        for task in (start, end, loss):
            task.cancel()
        drain_s, grace_s = settings.drain_s, settings.grace_s
        closing = [door.close(drain_s=drain_s, grace_s=grace_s)] if door is not None else []
        await asyncio.gather(server.stop(drain_s=drain_s, grace_s=grace_s), *closing)
    _log.info("stopped")
