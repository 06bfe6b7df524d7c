"""Who is in and who waits: songs, and visits to look at what was made. First come, first served."""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import grpc

from soundstage_dit.journey import Journey
from soundstage_dit.scheduler import Load, Queued, Room, tokens_until_room
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import OverloadedError, ServiceError


class SongTooLargeError(ServiceError):
    """A song needs more memory than all songs together may have."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "SONG_TOO_LARGE"


@dataclass(slots=True, kw_only=True, eq=False)
class Visit:
    """A short use of a model, which takes no song's place but needs the model on the device."""

    model: LoadedModel
    load: Load
    is_in: asyncio.Event = field(default_factory=asyncio.Event)


class Line:
    """Lets in as many as have room; up to `max_waiting` songs wait for it."""

    def __init__(self, room: Room, *, max_waiting: int) -> None:
        self.songs: list[Journey] = []
        self.seconds_per_token = 0.0
        self._room, self._max_waiting = room, max_waiting
        self._visits: list[Visit] = []
        self._waiting: deque[Journey | Visit] = deque()

    @property
    def num_waiting(self) -> int:
        """How many songs wait."""
        return sum(isinstance(guest, Journey) for guest in self._waiting)

    @property
    def begun(self) -> list[Journey]:
        """The songs that are in and prepared."""
        return [song for song in self.songs if song.trajectory is not None]

    @property
    def models_in_use(self) -> frozenset[LoadedModel]:
        """The models of all that are in."""
        return frozenset(guest.model for guest in (*self.songs, *self._visits))

    def enter(self, song: Journey) -> None:
        """Let a song in, or have it wait; raises SongTooLargeError and OverloadedError."""
        size_gb, max_gb = song.size_bytes / 1e9, self._room.max_bytes / 1e9
        if size_gb > max_gb:
            raise SongTooLargeError(
                f"a song of {song.song.num_frames} latent frames with these lyrics and options needs about "
                f"{size_gb:.3g} GB, and max_songs_gb is {max_gb:.3g}; a shorter song or shorter lyrics need less"
            )
        must_wait = bool(self._waiting) or not self._room.fits(self._loads(), song.load)
        if must_wait and self.num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{len(self.songs)} songs are under way and {self.num_waiting} wait, which is as many as may",
                metadata={"max_waiting": str(self._max_waiting)},
                retry_after_s=max(1.0, self._wait_s(song, [guest.load for guest in self._waiting])),
            )
        self._waiting.append(song)
        self._let_in()

    async def visit(self, visit: Visit) -> None:
        """Wait until a visit is in; that is at once unless somebody waits for another model than those in use."""
        is_free = all(guest.model in self.models_in_use for guest in self._waiting)
        if is_free and self._room.fits(self._loads(), visit.load):
            self._admit(visit)
        else:
            self._waiting.append(visit)
            self._let_in()
        await visit.is_in.wait()

    def leave(self, guest: Journey | Visit) -> None:
        """Let a guest go, wherever it is, and others in."""
        for guests in (self.songs, self._visits, self._waiting):
            if guest in guests:
                guests.remove(guest)  # pyright: ignore[reportArgumentType]
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._room.fits(self._loads(), self._waiting[0].load):
            self._admit(self._waiting.popleft())
        before: list[Load] = []
        for position, song in enumerate(self._waiting_songs()):
            if song.position != position:
                song.position = position
                song.events.put_nowait(Queued(position=position, wait_s=self._wait_s(song, before)))
            before.append(song.load)

    def _admit(self, guest: Journey | Visit) -> None:
        if isinstance(guest, Visit):
            self._visits.append(guest)
            guest.is_in.set()
        else:
            self.songs.append(guest)

    def _waiting_songs(self) -> Iterator[Journey]:
        return (guest for guest in self._waiting if isinstance(guest, Journey))

    def _loads(self) -> list[Load]:
        return [guest.load for guest in (*self.songs, *self._visits)]

    def _wait_s(self, song: Journey, before: Sequence[Load]) -> float:
        return self.seconds_per_token * tokens_until_room(self._room, self._loads(), before, song.load)
