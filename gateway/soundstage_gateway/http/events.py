"""A song's events as Server-Sent Events."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, TypeVar

from soundstage.music.v1.song_service_pb2 import WatchSongRequest, WatchSongResponse
from soundstage_gateway.http.errors import write_error
from soundstage_gateway.http.live import LiveResponse
from soundstage_gateway.http.wire import NO_CALL, write_message
from soundstage_gateway.servicer import SongServicer
from soundstage_runtime.errors import ServiceError

_KEEP_ALIVE_S: Final = 15.0
_REFUSAL_S: Final = 1.0  # a refusal comes at once; the head waits no longer for it

T = TypeVar("T")


async def follow(servicer: SongServicer, song: str, *, after: int | None) -> LiveResponse:
    """Answer with a song's events after one's number, those to come too, and `end`; raises what comes before them."""
    request = WatchSongRequest(song=song, after_sequence=after)
    answers = _or_none(servicer.WatchSong(request, NO_CALL))
    first = await anext(answers, None)
    headers = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
    return LiveResponse(_write_events(first, answers), headers)


async def _write_events(
    first: WatchSongResponse | None, answers: AsyncGenerator[WatchSongResponse | None, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(answers):
        try:
            yield _write_answer(first)
            async for answer in answers:
                yield _write_answer(answer)
            yield _write("end", {})
        except ServiceError as error:
            yield _write("end", write_error(error))


def _write_answer(answer: WatchSongResponse | None) -> bytes:
    if answer is None:
        return b": nothing new\n\n"
    return _write(str(answer.event.WhichOneof("event")), write_message(answer.event), number=answer.event.sequence)


def _write(kind: str, data: dict[str, Any], *, number: int | None = None) -> bytes:
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


async def _or_none(source: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """Yield what comes, and None whenever nothing has come for a while; close the source."""
    async with aclosing(source):
        coming = asyncio.ensure_future(anext(source, None))
        wait_s = _REFUSAL_S
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=wait_s)
                wait_s = _KEEP_ALIVE_S
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
