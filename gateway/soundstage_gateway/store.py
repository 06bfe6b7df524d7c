"""Songs on disk: a row for each in a database, and a folder for what is large."""

import asyncio
import fcntl
import io
import json
import shutil
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import wraps
from itertools import accumulate
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed
from sqlalchemy import LargeBinary, delete, func, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from soundstage.music.v1.song_service_pb2 import SONG_STATE_RUNNING, GenerateSongResponse, Song
from soundstage.type.v1.tensor_pb2 import Tensor
from soundstage_runtime.errors import StartError

PREFIX: Final = "songs/"
_PAGE_BYTES: Final = 1 << 19  # half of what a message may have: songs in the making are larger than they were written


@dataclass(slots=True, kw_only=True)
class KeptSong:
    """A song and what the gateway notes beside it.

    `song` is what clients see; `handles` and `peaks` (of the whole decoded song, once it is known) have one entry for
    each variant. `model_fingerprint` is the codec that its latents are for. A detached song does not end with a call.
    """

    song: Song
    request_id: str | None = None
    is_detached: bool = False
    model_fingerprint: str = ""
    events: list[GenerateSongResponse] = field(default_factory=list[GenerateSongResponse])
    handles: list[str] = field(default_factory=list[str])
    peaks: list[float | None] = field(default_factory=list["float | None"])

    @property
    def name(self) -> str:
        """Its name, "songs/{id}"."""
        return self.song.name


class RequestKnownError(Exception):
    """A request's id has made a song already."""


P = ParamSpec("P")
T = TypeVar("T")


def _whole(
    operation: "Callable[Concatenate[Store, P], Coroutine[Any, Any, T]]",
) -> "Callable[Concatenate[Store, P], Coroutine[Any, Any, T]]":
    """Let an operation end, and then its caller, though that is cancelled: the driver would lose the connection."""

    @wraps(operation)
    async def run(store: "Store", *args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.create_task(operation(store, *args, **kwargs))
        store.operations.add(task)
        task.add_done_callback(store.operations.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            task.result()  # that it failed says more
            raise

    return run


class _Rows(DeclarativeBase):
    pass


class _Row(_Rows):
    __tablename__ = "songs"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(unique=True)
    request_id: Mapped[str | None] = mapped_column(unique=True)
    is_running: Mapped[bool]
    is_detached: Mapped[bool]
    expire_time_s: Mapped[float] = mapped_column(index=True)
    size_bytes: Mapped[int]
    song: Mapped[bytes] = mapped_column(LargeBinary)
    events: Mapped[bytes] = mapped_column(LargeBinary)
    notes: Mapped[str]


class Store:
    """Songs by name, in a SQLite database below `folder`, or in the one that `url` names."""

    def __init__(self, folder: Path, *, limit_bytes: int, url: str | None = None) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._engine = create_async_engine(url or f"sqlite+aiosqlite:///{folder / 'songs.sqlite'}")
        self._session = async_sessionmaker(self._engine, expire_on_commit=False)
        self._files = ExitStack()
        self.operations: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Take the folder, which no other process may have, and make what is missing; raises StartError."""
        try:
            self._take_folder()
            async with self._engine.begin() as connection:
                await connection.run_sync(_Rows.metadata.create_all)
                names = set(await connection.scalars(select(_Row.name)))
        except (OSError, DBAPIError) as error:
            await self.close()
            raise StartError(f"data_dir is {self._folder}, {_say_why(error)}") from error
        for folder in self.folder_of(PREFIX).glob("*"):
            if f"{PREFIX}{folder.name}" not in names:
                self.discard(f"{PREFIX}{folder.name}")  # a process was killed before it wrote the song down

    async def close(self) -> None:
        """Let the database and the folder go, when what is begun has ended."""
        await asyncio.gather(*self.operations, return_exceptions=True)
        await self._engine.dispose()
        self._files.close()

    def _take_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = self._files.enter_context((self._folder / "lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @_whole
    async def add(self, kept: KeptSong) -> None:
        """Write a new song down, with what its folder holds by now; raises RequestKnownError."""
        self.folder_of(kept.name).mkdir(parents=True, exist_ok=True)
        row = _Row(name=kept.name, request_id=kept.request_id, is_detached=kept.is_detached, **self._columns(kept))
        try:
            async with self._session.begin() as session:
                session.add(row)
        except IntegrityError as error:  # names are drawn, so it is the request's id
            raise RequestKnownError(f"a song of request {kept.request_id!r} is kept already") from error

    @_whole
    async def update(self, kept: KeptSong) -> None:
        """Write down what has become of a song; nothing happens when it is not kept any more."""
        async with self._session.begin() as session:
            await session.execute(update(_Row).where(_Row.name == kept.name).values(**self._columns(kept)))

    async def find(self, name: str) -> KeptSong | None:
        """Return a song; None when it is not, or no longer, kept."""
        return await self._find(_Row.name == name)

    async def find_request(self, request_id: str) -> KeptSong | None:
        """Return the song that a request made."""
        return await self._find(_Row.request_id == request_id)

    @_whole
    async def page(self, size: int, *, before: int | None) -> tuple[list[KeptSong], int | None]:
        """Return up to `size` songs, the newest first, and what to give as `before` for the next; None at the end.

        Large songs make a shorter page, of one at the least.
        """
        query = select(_Row).order_by(_Row.number.desc()).limit(size + 1)
        async with self._session() as session:
            rows = (await session.scalars(query if before is None else query.where(_Row.number < before))).all()
        ends = accumulate(len(row.song) for row in rows[:size])
        fitting = rows[: max(1, sum(end <= _PAGE_BYTES for end in ends))]
        return [_read(row) for row in fitting], fitting[-1].number if len(rows) > len(fitting) else None

    @_whole
    async def running(self) -> list[KeptSong]:
        """Return the songs that a process has begun and not ended, the oldest first."""
        async with self._session() as session:
            rows = (await session.scalars(select(_Row).where(_Row.is_running).order_by(_Row.number))).all()
        return [_read(row) for row in rows]

    @_whole
    async def remove(self, name: str) -> None:
        """Forget a song and its files."""
        async with self._session.begin() as session:
            await session.execute(delete(_Row).where(_Row.name == name))
        self.discard(name)

    def discard(self, name: str) -> None:
        """Delete the files of a song."""
        shutil.rmtree(self.folder_of(name), ignore_errors=True)

    @_whole
    async def sweep(self, now_s: float) -> list[str]:
        """Forget what has expired, then the oldest until the rest fits; return their names. Running songs stay."""
        has_expired = _Row.expire_time_s <= now_s
        done = select(_Row.name, _Row.size_bytes, has_expired).where(_Row.is_running.is_(False))
        gone: list[str] = []
        async with self._session() as session:
            size_bytes = (await session.scalar(select(func.sum(_Row.size_bytes)))) or 0
            for name, taken_bytes, is_over in await session.execute(done.order_by(has_expired.desc(), _Row.number)):
                if is_over or size_bytes > self._limit_bytes:
                    gone.append(name)
                    size_bytes -= taken_bytes
        for name in gone:
            await self.remove(name)
        return gone

    def folder_of(self, name: str) -> Path:
        """Name the folder of a song's files."""
        return self._folder / name

    def write_latents(self, name: str, variant: int, latents: Tensor) -> None:
        """Keep a variant's master tape."""
        self._latents_file(name, variant).write_bytes(latents.SerializeToString())

    def read_latents(self, name: str, variant: int) -> Tensor:
        """Return a variant's master tape."""
        return Tensor.FromString(self._latents_file(name, variant).read_bytes())

    def _latents_file(self, name: str, variant: int) -> Path:
        return self.folder_of(name) / f"{variant}.latents"

    @_whole
    async def _find(self, condition: object) -> KeptSong | None:
        async with self._session() as session:
            row = await session.scalar(select(_Row).where(condition))  # pyright: ignore[reportArgumentType]
        return _read(row) if row else None

    def _columns(self, kept: KeptSong) -> dict[str, object]:
        files = self.folder_of(kept.name).glob("*")
        notes = json.dumps({"model_fingerprint": kept.model_fingerprint, "handles": kept.handles, "peaks": kept.peaks})
        song, events = kept.song.SerializeToString(), _join(kept.events)
        row_bytes = len(song) + len(events) + len(notes)
        return {
            "is_running": kept.song.state == SONG_STATE_RUNNING,
            "expire_time_s": kept.song.expire_time.ToMilliseconds() / 1000,
            "size_bytes": row_bytes + sum(file.stat().st_size for file in files),
            "song": song,
            "events": events,
            "notes": notes,
        }


def _say_why(error: OSError | DBAPIError) -> str:
    """Say why a folder cannot be had, and what would do."""
    if isinstance(error, BlockingIOError):
        return "where another gateway keeps its songs; stop that one, or give each a folder of its own"
    cause = error.orig if isinstance(error, DBAPIError) else error.strerror
    return f"where no songs can be kept: {cause}; give a folder that can be written, new or of an earlier gateway"


def _read(row: _Row) -> KeptSong:
    return KeptSong(
        song=Song.FromString(row.song),
        request_id=row.request_id,
        is_detached=row.is_detached,
        events=_split(row.events),
        **json.loads(row.notes),
    )


def _join(events: Sequence[GenerateSongResponse]) -> bytes:
    out = io.BytesIO()
    for event in events:
        serialize_length_prefixed(event, out)
    return out.getvalue()


def _split(data: bytes) -> list[GenerateSongResponse]:
    file = io.BytesIO(data)
    events: list[GenerateSongResponse] = []
    while file.tell() < len(data):
        events.append(parse_length_prefixed(GenerateSongResponse, file))
    return events
