"""The one way to a gateway: a channel that carries the user's key."""

import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import grpc.aio
import typer

from soundstage_runtime.serve import CHANNEL_OPTIONS

KEY_VARIABLE: Final = "SOUNDSTAGE_KEY"

Continue = Callable[[grpc.aio.ClientCallDetails, Any], Awaitable[Any]]


def open_channel(target: str) -> grpc.aio.Channel:
    """Open a channel that notices when its gateway is gone, and finds back to it soon.

    SOUNDSTAGE_KEY, if it is set, goes with every call; raises typer.BadParameter when no call could carry it,
    and when there is no target.
    """
    if not target:
        raise typer.BadParameter("is empty; give the gateway's host:port", param_hint="--gateway")
    key = os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()):
        raise typer.BadParameter("holds more than printable ASCII, which no call can carry", param_hint=KEY_VARIABLE)
    keyed = [kind(key) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary)] if key else None
    return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS, interceptors=keyed)


class _Keyed:
    def __init__(self, key: str) -> None:
        self._header = ("authorization", f"Bearer {key}")

    async def _go_on(self, continuation: Continue, details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), self._header)
        return await continuation(cast(Any, details)._replace(metadata=metadata), request)


# gRPC looks at what an interceptor is, and takes it for one kind of call only.
class _UnaryUnary(_Keyed, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._go_on(continuation, client_call_details, request)


class _UnaryStream(_Keyed, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._go_on(continuation, client_call_details, request)


class _StreamUnary(_Keyed, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await self._go_on(continuation, client_call_details, request_iterator)
