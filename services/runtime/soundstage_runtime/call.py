"""The call being served: its ids and deadline, and how they travel to the next hop."""

import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import grpc.aio
import structlog

REQUEST_ID_KEY = "x-request-id"
SONG_KEY = "x-song"
_HOP_MARGIN_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Who is asking and until when; `deadline_s` is on the monotonic clock, None for no deadline."""

    request_id: str
    song: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """What a call to the next process is given: seconds left, and metadata."""

    timeout_s: float | None
    metadata: tuple[tuple[str, str], ...]


_current: ContextVar[Call | None] = ContextVar("call", default=None)


def begin(context: "grpc.aio.ServicerContext[Any, Any]") -> Call:
    """Read the ids and the deadline of an incoming call, making a request id where there is none; bind them to logs."""
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    remaining_s = cast(float | None, context.time_remaining())  # the stub forgets None
    call = Call(
        request_id=metadata.get(REQUEST_ID_KEY) or uuid.uuid4().hex,
        song=metadata.get(SONG_KEY, ""),
        deadline_s=None if remaining_s is None else time.monotonic() + remaining_s,
    )
    enter(call)
    return call


def name_song(song: str) -> None:
    """Give the current call its song's name; logs and later hops carry it."""
    call = _current.get()
    enter(replace(call, song=song) if call else Call(request_id=uuid.uuid4().hex, song=song))


def detach() -> None:
    """Let what is begun from here on outlive the current call's deadline."""
    call = _current.get()
    if call is not None:
        enter(replace(call, deadline_s=None))


def current_id() -> str:
    """Return the current call's request id; empty where there is no call."""
    call = _current.get()
    return call.request_id if call else ""


def next_hop() -> Hop:
    """What to pass on: the ids, and the time left less a margin for the way back."""
    call = _current.get()
    if call is None:
        return Hop(timeout_s=None, metadata=())
    timeout_s = None if call.deadline_s is None else max(0.0, call.deadline_s - time.monotonic() - _HOP_MARGIN_S)
    metadata = ((REQUEST_ID_KEY, call.request_id),) + (((SONG_KEY, call.song),) if call.song else ())
    return Hop(timeout_s=timeout_s, metadata=metadata)


def enter(call: Call) -> None:
    """Make a call the current one, and bind its ids to logs."""
    _current.set(call)
    structlog.contextvars.bind_contextvars(request_id=call.request_id, **({"song": call.song} if call.song else {}))
