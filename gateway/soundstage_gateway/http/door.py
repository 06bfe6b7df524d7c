"""The HTTP port: uvicorn inside the gateway's event loop."""

import asyncio
import socket
from typing import Final

import structlog
import uvicorn

from soundstage_gateway.http.app import Api
from soundstage_runtime.serve import PortTakenError

_log = structlog.get_logger()

_BACKLOG: Final = 512
_LAST_ANSWERS_S: Final = 0.5


class HttpDoor:
    """Serves an Api on a port of its own.

    Signals are the process's affair, so uvicorn's parts are called one by one.
    """

    def __init__(self, api: Api, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._api = api
        self._address = (host, port)
        self._config = uvicorn.Config(
            api.app,
            http="h11",
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
