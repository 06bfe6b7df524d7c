"""Lyrics in time: which songs can be asked for, and lines as an LRC file."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

import grpc

from soundstage.type.v1.score_pb2 import LyricLine
from soundstage_runtime.errors import ServiceError

_MAX_SONGS: Final = 4096  # more than the diffusion stage keeps


class SongUnknownError(ServiceError):
    """A song was never finished here, or too many have been since."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "SONG_UNKNOWN"


class Finished:
    """The diffusion stage's handles of finished variants, at most `max_songs`; the oldest go first."""

    def __init__(self, max_songs: int = _MAX_SONGS) -> None:
        self._max_songs = max_songs
        self._handles: OrderedDict[tuple[str, int], str] = OrderedDict()

    def note(self, song: str, variant: int, handle: str) -> None:
        """Note a variant of a song, counted from 0."""
        self._handles[song, variant] = handle
        if len(self._handles) > self._max_songs:
            self._handles.popitem(last=False)

    def find(self, song: str, variant: int) -> str:
        """Return a variant's handle; raises SongUnknownError."""
        handle = self._handles.get((song, variant))
        if handle is None:
            raise SongUnknownError(
                f"song {song[:64]!r} has no finished variant {variant} here; give a name from `accepted` or "
                "`completed`, and a variant from 0; only the last songs that were made are known"
            )
        return handle


def write_lrc(lines: Iterable[LyricLine]) -> str:
    """Write lines as an LRC file, one `[mm:ss.xx]text` each."""
    return "".join(f"[{_write_time(line.start_s)}]{line.text}\n" for line in lines)


def _write_time(seconds: float) -> str:
    hundredths = round(seconds * 100)  # rounded first, or 59.999 s would be 60.00 s of a minute
    return f"{hundredths // 6000:02}:{hundredths // 100 % 60:02}.{hundredths % 100:02}"
