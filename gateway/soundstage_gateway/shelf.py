"""A shelf: encoded audio, kept on disk while there is room."""

import asyncio
import shutil
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True, kw_only=True)
class Place:
    """A folder on the shelf; who fills it holds the lock. One that `has_to_go` is there for its holders alone."""

    folder: Path
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_holders: int = 0
    size_bytes: int = 0
    has_to_go: bool = False


class Shelf:
    """Places by name, at most `limit_bytes` beyond those that are held; the least used go first."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._places: OrderedDict[str, Place] = OrderedDict()

    @property
    def size_bytes(self) -> int:
        """What the places take, as far as they have been let go."""
        return sum(place.size_bytes for place in self._places.values())

    @contextmanager
    def hold(self, name: str) -> Generator[Place, None, None]:
        """Keep a place, an empty one if there is none, from being cleared."""
        if name not in self._places:
            self._places[name] = Place(folder=self._folder / name)
            self._places[name].folder.mkdir(parents=True)
        self._places.move_to_end(name)
        place = self._places[name]
        place.num_holders += 1
        try:
            yield place
        finally:
            place.num_holders -= 1
            if not place.num_holders:
                self._let_go(name, place)

    def remove(self, song: str) -> None:
        """Clear a song's places, those that are held as soon as they are let go."""
        for name, place in list(self._places.items()):
            if name.startswith(f"{song.rpartition('/')[2]}-"):
                place.has_to_go = True
                if not place.num_holders:
                    self._clear(name)

    def _let_go(self, name: str, place: Place) -> None:
        place.size_bytes = sum(file.stat().st_size for file in place.folder.glob("*"))
        if place.has_to_go or not place.size_bytes:
            self._clear(name)
        self._make_room()

    def _make_room(self) -> None:
        size_bytes = self.size_bytes
        for name in [name for name, place in self._places.items() if not place.num_holders]:
            if size_bytes <= self._limit_bytes:
                break
            size_bytes -= self._places[name].size_bytes
            self._clear(name)

    def _clear(self, name: str) -> None:
        shutil.rmtree(self._places.pop(name).folder)
