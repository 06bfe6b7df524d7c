"""The HTTP port: uvicorn inside the gateway's event loop."""

import asyncio
import socket
from typing import Final

import h11
import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from soundstage_gateway.http.app import Api
from soundstage_runtime.serve import PortTakenError

_log = structlog.get_logger()

_BACKLOG: Final = 512
_LAST_ANSWERS_S: Final = 0.5
_MAX_HEAD_BYTES: Final = 1 << 16
_MAX_CONNECTIONS: Final = 2048  # listeners, watchers, and as many who only ask; beyond, each is told 503
_IDLE_TIMEOUT_S: Final = 10  # between two requests, and until the head of one is whole


class _Connection(H11Protocol):
    """A connection that ends when the head of a request, or its beginning, is long in coming."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._rest()
        elif self._patience is None:
            self._patience = self.loop.call_later(self.timeout_keep_alive, self.transport.close)

    def _rest(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class HttpDoor:
    """Serves an Api on a port of its own.

    Signals are the process's affair, so uvicorn's parts are called one by one.
    """

    def __init__(
        self,
        api: Api,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_connections: int = _MAX_CONNECTIONS,
        idle_timeout_s: int = _IDLE_TIMEOUT_S,
    ) -> None:
        self._api = api
        self._address = (host, port)
        self._config = uvicorn.Config(
            api.app,
            http=_Connection,
            timeout_keep_alive=idle_timeout_s,
            limit_concurrency=max_connections,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the gate tells what happens
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        self._server = uvicorn.Server(self._config)
        self._ticking: asyncio.Task[None] | None = None
        self.port = 0

    async def open(self) -> None:
        """Bind and serve; raises PortTakenError."""
        host, port = self._address
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host.strip("[]"), port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise PortTakenError(
                f"cannot listen on {host}:{port}: the port is taken or the address not ours ({error})"
            ) from error
        self.port = int(listener.getsockname()[1])
        self._config.load()
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self._server.startup([listener])
        self._ticking = asyncio.create_task(self._server.main_loop())
        _log.info("http_listening", host=host, port=self.port)

    async def close(self, *, drain_s: float = 0.0, grace_s: float = 0.0) -> None:
        """Say that it drains, wait `drain_s`, then let no more in and give those inside `grace_s` to end."""
        self._api.is_draining = True
        if self._ticking is None:
            return
        await asyncio.sleep(drain_s)
        for server in self._server.servers:
            server.close()
        if self._server.server_state.connections:
            ending = asyncio.create_task(self._server.shutdown())
            await self._api.app.end(grace_s)
            await asyncio.wait({ending}, timeout=_LAST_ANSWERS_S)
            self._server.force_exit = True  # whoever has not taken the last answer by now is left
            await ending
        self._ticking.cancel()
