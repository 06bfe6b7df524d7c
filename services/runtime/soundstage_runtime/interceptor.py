"""Around every RPC: ids and deadline in, one log line out, errors mapped to status and details."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, cast

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from soundstage_runtime import call
from soundstage_runtime.errors import InvalidRequestError, ServiceError, Violation, abort

_log = structlog.get_logger()
_NOT_OURS = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_HEAR_OUT_S = 0.25
_DESCRIBE = "/soundstage.stage.v1.StageService/Describe"

Context = grpc.aio.ServicerContext[Any, Any]
Check = Callable[[str], None]
"""Look at a call's `authorization`, empty where it has none; raise ServiceError to refuse the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A call that has ended: how, after how long, and what was answered."""

    method: str
    outcome: str
    duration_s: float
    sent_bytes: int


class ClosingError(ServiceError):
    """The process is about to end."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "CLOSING"


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps handlers. Streaming methods must be async generators, unary ones coroutines."""

    def __init__(self, *, check: Check | None = None, observe: Callable[[Ended], None] | None = None) -> None:
        self._check = check
        self._observe = observe
        self._in_flight = 0
        self._is_closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse(self) -> None:
        """Refuse new calls from now on; health and reflection go on."""
        self._is_closed = True

    async def wait_until_idle(self) -> None:
        """Wait until no call is being served. Watchers of health may stay for ever and do not count."""
        await self._idle.wait()

    @asynccontextmanager
    async def _admitted(self, context: Context) -> AsyncGenerator[None, None]:
        if self._is_closed:
            raise ClosingError("the server is stopping; ask another, or this one when it is back", retry_after_s=1)
        if self._check is not None:
            self._check(str(dict(context.invocation_metadata() or ()).get("authorization", "")))
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(_NOT_OURS):
            return handler
        streams = handler.response_streaming
        behaviour, make = {
            (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
            (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
            (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
            (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
        }[(handler.request_streaming, streams)]
        read = _read_each if handler.request_streaming else _read
        parse = partial(read, handler.request_deserializer)
        serve = partial(_Served, method, serialize=cast(Any, handler.response_serializer), observe=self._observe)
        wrapped = (self._wrap_stream if streams else self._wrap_unary)(serve, cast(Any, behaviour), parse)
        # Bytes are parsed and written by us: what cannot be parsed is then refused as any other bad request is.
        return cast(Any, make)(wrapped, None, None)

    def _wrap_unary(
        self,
        serve: Callable[[Context, Any], _Served],
        behaviour: Callable[[Any, Context], Awaitable[Any]],
        parse: Callable[[Any], Any],
    ) -> Callable[..., Awaitable[Any]]:
        async def unary(request: Any, context: Context) -> Any:
            async with serve(context, request) as served, self._admitted(context):
                return served.write(await behaviour(parse(request), context))

        return unary

    def _wrap_stream(
        self,
        serve: Callable[[Context, Any], _Served],
        behaviour: Callable[[Any, Context], AsyncIterator[Any]],
        parse: Callable[[Any], Any],
    ) -> Callable[..., AsyncIterator[Any]]:
        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with serve(context, request) as served, self._admitted(context):
                responses = cast(Any, behaviour(parse(request), context))
                try:
                    async for response in responses:
                        yield served.write(response)
                finally:
                    # A cancelled call must free its places now, not when the collector finds the generator.
                    await responses.aclose()

        return stream


def _read(deserialize: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return deserialize(data)
    except DecodeError as error:
        raise InvalidRequestError([Violation(field="request", description=f"cannot be parsed: {error}")]) from error


async def _read_each(deserialize: Callable[[bytes], Any], requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in requests:
        yield _read(deserialize, data)


async def _hear_out(request: Any) -> None:
    """Read what a client that streams has on the way, before its call is refused.

    Python's asyncio client loses the status of a call that ends while it is still sending.
    """
    if isinstance(request, AsyncIterable):
        with suppress(TimeoutError, grpc.aio.BaseError):
            async with asyncio.timeout(_HEAR_OUT_S):
                async for _ in cast("AsyncIterable[bytes]", request):
                    pass


class _Served:
    """The span of one call, as a context manager: tells its end, turns errors into an abort, weighs what is sent."""

    def __init__(
        self,
        method: str,
        context: Context,
        request: Any,
        *,
        serialize: Callable[[Any], bytes],
        observe: Callable[[Ended], None] | None,
    ) -> None:
        self._method = method
        self._context = context
        self._request = request
        self._serialize = serialize
        self._observe = observe
        self._sent_bytes = 0

    def write(self, response: Any) -> bytes:
        data = self._serialize(response)
        self._sent_bytes += len(data)
        return data

    async def __aenter__(self) -> Self:
        self._started_s = time.monotonic()
        call.begin(self._context)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        outcome = "ok" if error is None else "cancelled"
        try:
            if isinstance(error, ServiceError):
                outcome = error.code.name.lower()
                await _hear_out(self._request)
                await abort(self._context, error)
            if isinstance(error, Exception) and not isinstance(error, (grpc.aio.AbortError, grpc.aio.BaseError)):
                outcome = "internal"
                _log.exception("rpc_failed", method=self._method, exc_info=error)
                await abort(self._context, ServiceError("an internal error; the server's log has it by request id"))
        finally:
            log = _log.debug if self._method == _DESCRIBE else _log.info  # asked before every song
            duration_s = time.monotonic() - self._started_s
            log("rpc_finished", method=self._method, outcome=outcome, duration_s=round(duration_s, 4))
            if self._observe is not None:
                self._observe(
                    Ended(method=self._method, outcome=outcome, duration_s=duration_s, sent_bytes=self._sent_bytes)
                )
            structlog.contextvars.clear_contextvars()
