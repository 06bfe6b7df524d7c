"""A song's events, for whoever follows them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from soundstage.music.v1.song_service_pb2 import GenerateSongResponse
from soundstage_runtime.errors import ServiceError

_LONG: Final = 256


class Log:
    """Events in order, numbered from 0. A long log drops progress that newer progress overtakes."""

    def __init__(self) -> None:
        self.events: list[GenerateSongResponse] = []
        self._next_sequence = 0
        self._is_closed = False
        self._error: ServiceError | None = None
        self._news = asyncio.Event()

    def append(self, event: GenerateSongResponse) -> None:
        """Number an event and show it to all followers."""
        event.sequence = self._next_sequence
        self._next_sequence += 1
        if len(self.events) >= _LONG and event.WhichOneof("event") in ("progress", "queued"):
            self.events = [known for known in self.events if not _is_overtaken(known, event)]
        self.events.append(event)
        self._tell()

    def close(self, error: ServiceError | None = None) -> None:
        """End the log; its followers end too, with `error` if there is one."""
        self._is_closed, self._error = True, error
        self._tell()

    async def follow(self, after: int | None = None) -> AsyncGenerator[GenerateSongResponse, None]:
        """Yield the events after one's number, those to come too; raises the error that ended the song.

        A number that the log has not come to is of an earlier process, which began the song before: all is told again.
        """
        last = self.events[-1].sequence if self.events else -1
        next_sequence = 0 if after is None or after > last else after + 1
        while True:
            news = self._news
            for event in [event for event in self.events if event.sequence >= next_sequence]:
                yield event
                next_sequence = event.sequence + 1
            if news is self._news:
                if self._is_closed:
                    break
                await news.wait()
        if self._error is not None:
            raise self._error

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _is_overtaken(old: GenerateSongResponse, new: GenerateSongResponse) -> bool:
    """Tell whether both say the same of the same: how far a stage is with a variant, or where it waits."""
    kind = new.WhichOneof("event")
    return (
        old.WhichOneof("event") == kind
        and old.variant == new.variant
        and getattr(old, str(kind)).stage == getattr(new, str(kind)).stage
    )
