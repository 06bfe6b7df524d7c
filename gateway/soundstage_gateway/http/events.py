"""A song's events as Server-Sent Events."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final, TypeVar

from soundstage.music.v1.song_service_pb2 import WatchSongRequest
from soundstage_gateway.http.errors import write_error
from soundstage_gateway.http.live import LiveResponse
from soundstage_gateway.http.wire import NO_CALL, write_message
from soundstage_gateway.servicer import SongServicer
from soundstage_runtime.errors import ServiceError

KEEP_ALIVE_S: Final = 15.0

T = TypeVar("T")


def follow(servicer: SongServicer, song: str, *, after: int | None, keep_alive_s: float = KEEP_ALIVE_S) -> LiveResponse:
    """Answer with a song's events after one's number, those to come too, and `end`."""
    pieces = _write_events(servicer, WatchSongRequest(song=song, after_sequence=after), keep_alive_s)
    return LiveResponse(pieces, {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"})


async def _write_events(
    servicer: SongServicer, request: WatchSongRequest, keep_alive_s: float
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(servicer.WatchSong(request, NO_CALL)) as events:
            async for answer in _or_none(events, keep_alive_s):
                if answer is None:
                    yield b": nothing new\n\n"
                else:
                    event = answer.event
                    yield _write(str(event.WhichOneof("event")), write_message(event), number=event.sequence)
        yield _write("end", {})
    except ServiceError as error:
        yield _write("end", write_error(error))


def _write(kind: str, data: dict[str, Any], *, number: int | None = None) -> bytes:
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


async def _or_none(source: AsyncIterator[T], wait_s: float) -> AsyncGenerator[T | None, None]:
    """Yield what comes, and None whenever nothing has come for a while."""
    coming = asyncio.ensure_future(anext(source, None))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=wait_s)
            if not done:
                yield None
            elif (found := coming.result()) is None:
                break
            else:
                yield found
                coming = asyncio.ensure_future(anext(source, None))
    finally:
        coming.cancel()
        await asyncio.wait({coming})
