"""Around every HTTP request: its id, its key, whom it calls, its end, one log line."""

import asyncio
import re
import time
import uuid
from typing import Final

import structlog
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soundstage_gateway.http.errors import MethodUnknownError, RequestSlowError, RouteUnknownError, respond
from soundstage_gateway.http.names import Names
from soundstage_gateway.keys import Keys
from soundstage_gateway.metrics import Metrics
from soundstage_runtime import call
from soundstage_runtime.errors import ServiceError

_log = structlog.get_logger()

_METHODS: Final = ("GET", "HEAD", "POST", "DELETE")
_OPEN: Final = re.compile("/|/healthz|/static/.*")
_REQUEST_ID: Final = re.compile(r"[!-~]{1,64}")
_WHOLE_S: Final = 600.0  # in which the largest file comes over a slow line


class Gate:
    """Lets in who has a key, if there are `keys`, and calls by a known name, and ends what nobody waits for.

    A request ends when its client goes away, or takes nothing for `stall_timeout_s` while there is something to take.
    Before the first byte an error is an answer; after it, the connection is cut, so that no client takes a part for
    the whole.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys | None, names: Names, metrics: Metrics, *, stall_timeout_s: float
    ) -> None:
        self._app = app
        self._keys = keys
        self._names = names
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s
        self._works: set[asyncio.Task[None]] = set()

    async def end(self, grace_s: float) -> None:
        """Give the requests that are served `grace_s` to end, then end them."""
        if self._works:
            await asyncio.wait(self._works, timeout=grace_s)
        for work in self._works:
            work.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        started_s = time.monotonic()
        asked_id = Request(scope).headers.get(call.REQUEST_ID_KEY, "")
        request_id = asked_id if _REQUEST_ID.fullmatch(asked_id) else uuid.uuid4().hex
        call.enter(call.Call(request_id=request_id))
        answer = _Answer(send, request_id, self._stall_timeout_s)
        # Until its body has come, a client is heard by the work itself.
        is_heard = asyncio.Event()
        if scope["method"] in ("GET", "HEAD"):
            is_heard.set()
        work = asyncio.create_task(self._serve(scope, _noting_the_end(receive, is_heard), answer))
        self._works.add(work)
        gone = asyncio.create_task(_wait_until_gone(receive, is_heard))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.wait({work})
            self._works.discard(work)
            duration_s = time.monotonic() - started_s
            method = scope["method"] if scope["method"] in _METHODS else "OTHER"
            route = getattr(scope.get("endpoint"), "__name__", "none")
            counts = {"duration_s": round(duration_s, 4), "sent_bytes": answer.sent_bytes}
            _log.info(
                "http_finished", method=method, route=route, status=answer.status, is_whole=answer.is_whole, **counts
            )
            self._metrics.count_request(
                route, method, answer.status, duration_s=duration_s, sent_bytes=answer.sent_bytes
            )
            structlog.contextvars.clear_contextvars()

    async def _serve(self, scope: Scope, receive: Receive, answer: "_Answer") -> None:
        try:
            self._check(scope)
            scope["app"] = self  # it makes routers raise what else they would answer in plain text
            await self._app(scope, receive, answer.send)
        except Exception as error:
            told = _tell(error)
            if answer.status:
                _log.warning("http_cut", reason=told.reason, error=told.message)
            else:
                await respond(told, answer.request_id)(scope, receive, answer.send)

    def _check(self, scope: Scope) -> None:
        request = Request(scope)
        # The path that the routes go by: a request's address is also made of what its Host header says.
        if self._keys is not None and not _OPEN.fullmatch(scope["path"]):
            in_query = request.query_params.get("key", "")
            self._keys.check(request.headers.get("authorization", "") or (in_query and f"Bearer {in_query}"))
        self._names.check(scope["method"], request.headers)


class _Answer:
    """What is sent: `status` is 0 before the first byte, or for ever if the client went away before it."""

    def __init__(self, send: Send, request_id: str, stall_timeout_s: float) -> None:
        self._send = send
        self.request_id = request_id
        self._stall_timeout_s = stall_timeout_s
        self.status = 0
        self.sent_bytes = 0
        self.is_whole = False

    async def send(self, message: Message) -> None:
        """Send a message of ASGI; a client that does not take it is left."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            headers = MutableHeaders(raw=list(message["headers"]))
            headers[call.REQUEST_ID_KEY] = self.request_id
            headers["x-content-type-options"] = "nosniff"
            message = {**message, "headers": headers.raw}
        else:
            self.sent_bytes += len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._stall_timeout_s):
                await self._send(message)
        except TimeoutError as error:
            raise ClientGoneError(f"the client took nothing for {self._stall_timeout_s:g} s") from error
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body")


class ClientGoneError(ServiceError):
    """The client takes nothing any more, or sends no more."""

    reason = "CLIENT_GONE"


def _tell(error: Exception) -> ServiceError:
    """Return what a client is told; what is not meant for one goes to the log."""
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            return MethodUnknownError(f"this path takes {allowed}", metadata={"allowed": allowed})
        return RouteUnknownError("there is nothing at this path; gateway/README.md lists what there is")
    if isinstance(error, ClientDisconnect):
        return ClientGoneError("the client went away before its request was whole")
    _log.error("http_failed", exc_info=error)
    return ServiceError("an internal error; the server's log has it by request id")


def _noting_the_end(receive: Receive, is_heard: asyncio.Event) -> Receive:
    """Receive in the same way, and set `is_heard` when the whole request has come; raises RequestSlowError."""
    end_s = asyncio.get_running_loop().time() + _WHOLE_S

    async def hear() -> Message:
        try:
            async with asyncio.timeout_at(None if is_heard.is_set() else end_s):
                message = await receive()
        except TimeoutError as error:
            raise RequestSlowError(f"the request was not whole after {_WHOLE_S:g} s") from error
        if not message.get("more_body"):
            is_heard.set()
        return message

    return hear


async def _wait_until_gone(receive: Receive, is_heard: asyncio.Event) -> None:
    await is_heard.wait()
    while (await receive())["type"] != "http.disconnect":
        pass
