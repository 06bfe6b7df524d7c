"""What is kept of the songs that were made, under handles, until newer songs push them out."""

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc

from soundstage_dit.song import Latents, Song
from soundstage_runtime.errors import ServiceError

if TYPE_CHECKING:
    from soundstage_dit.adapters import Loan

MAX_KEPT_BYTES: Final = 2**30  # more than a hundred songs of ten minutes
_WORDS_BYTES: Final = 2**18  # what caption, lyrics and codes take at most


class SongForgottenError(ServiceError):
    """No song is kept under a handle."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "SONG_FORGOTTEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepsake:
    """A song that was made. Its conditions are not kept: they follow from `song`, and take ten times the room."""

    song: Song
    latents: Latents
    adapters: "Loan"

    @property
    def size_bytes(self) -> int:
        """The memory it takes at most."""
        arrays = [self.latents, *self.song.references, *([] if self.song.source is None else [self.song.source])]
        return _WORDS_BYTES + sum(array.nbytes for array in arrays)


class Keepsakes:
    """Keeps songs, at most `max_bytes` of them; those that were asked for least recently go first."""

    def __init__(self, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Keepsake] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """The memory that all songs take at most."""
        return sum(keepsake.size_bytes for keepsake in self._kept.values())

    def keep(self, keepsake: Keepsake) -> str:
        """Keep a song; returns its handle, which nobody can guess."""
        handle = secrets.token_hex(16)
        self._kept[handle] = keepsake
        while self.size_bytes > self._max_bytes:
            self._kept.popitem(last=False)
        return handle

    def find(self, handle: str) -> Keepsake:
        """Return a song; raises SongForgottenError."""
        if handle not in self._kept:
            raise SongForgottenError(
                f"no song is kept as {handle[:64]!r}: songs are forgotten when newer ones push them out, or when the "
                "stage starts anew; make the song again"
            )
        self._kept.move_to_end(handle)
        return self._kept[handle]
