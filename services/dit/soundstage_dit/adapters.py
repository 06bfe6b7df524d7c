"""The adapters that songs can be made with: loaded and forgotten while others are at work."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from soundstage_dit.adapter_card import AdapterCard
from soundstage_dit.adapter_file import AdapterFile, find_files, read_adapter
from soundstage_dit.model.adapter import Adaptation, Delta
from soundstage_dit.model.dit import Dit
from soundstage_runtime.errors import InvalidRequestError, OverloadedError, ServiceError, Violation
from soundstage_runtime.worker import Worker


class AdapterNotFoundError(ServiceError):
    """No adapter of that name is loaded, or no file is there."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "ADAPTER_NOT_FOUND"


class AdapterExistsError(ServiceError):
    """An adapter of that name is loaded."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "ADAPTER_EXISTS"


class NoAdapterFolderError(ServiceError):
    """The stage was started without a directory of adapters."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NO_ADAPTER_DIRECTORY"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    card: AdapterCard
    deltas: Mapping[str, Delta]


class Adapters:
    """Loads adapters for a transformer from below `folder`, at most `max_count`, of `max_bytes` in all."""

    def __init__(
        self,
        dit: Dit,
        worker: Worker,
        *,
        folder: Path | None = None,
        max_count: int = 16,
        max_bytes: int = 4_000_000_000,
    ) -> None:
        self._dit, self._worker = dit, worker
        self._folder = folder
        self._max_count, self._max_bytes = max_count, max_bytes
        self._loaded: dict[str, _Adapter] = {}
        self._loading = asyncio.Lock()  # what is loaded next must know the size of what was loaded before

    def cards(self) -> list[AdapterCard]:
        """Tell what is loaded, by name."""
        return [self._loaded[name].card for name in sorted(self._loaded)]

    async def load(self, name: str, path: str) -> AdapterCard:
        """Load the adapter at `path` below the folder.

        Raises AdapterExistsError, AdapterNotFoundError, AdapterFileError, NoAdapterFolderError, OverloadedError where
        there is no room, and InvalidRequestError for a path that leads out of the folder.
        """
        async with self._loading:
            if name in self._loaded:
                raise AdapterExistsError(f"an adapter {name!r} is loaded; unload it first, or take another name")
            if len(self._loaded) >= self._max_count:
                raise OverloadedError(f"{len(self._loaded)} adapters are loaded, as many as may be; unload one first")
            weights, config = self._locate(path)
            self._check_room(name, weights.stat().st_size)
            file = await self._worker.run(self._read, weights, config)
            size_bytes = sum(delta.size_bytes for delta in file.deltas.values())
            self._check_room(name, size_bytes)
            card = AdapterCard(name=name, kind=file.kind, rank=file.rank, size_bytes=size_bytes)
            self._loaded[name] = _Adapter(card=card, deltas=file.deltas)
            return card

    def unload(self, name: str) -> None:
        """Forget an adapter, but for songs that have it already; raises AdapterNotFoundError."""
        self._find("name", name)
        del self._loaded[name]

    def find(self, uses: Sequence[tuple[str, float]]) -> tuple[Adaptation, ...]:
        """Find the adapters of a song, each a name and a scale; raises AdapterNotFoundError."""
        found = [(self._find(f"adapters[{index}].name", name), scale) for index, (name, scale) in enumerate(uses)]
        return tuple(Adaptation(deltas=adapter.deltas, scale=scale) for adapter, scale in found if scale)

    def _find(self, field: str, name: str) -> _Adapter:
        try:
            return self._loaded[name]
        except KeyError as error:
            loaded = ", ".join(sorted(self._loaded)) or "none"
            raise AdapterNotFoundError(f"{field} is {name!r}, which is not loaded; loaded: {loaded}") from error

    def _check_room(self, name: str, size_bytes: int) -> None:
        taken = sum(adapter.card.size_bytes for adapter in self._loaded.values())
        if taken + size_bytes > self._max_bytes:
            raise OverloadedError(
                f"{name!r} takes {size_bytes / 1e6:.3g} MB, and of {self._max_bytes / 1e6:.3g} MB for adapters "
                f"{taken / 1e6:.3g} are taken; unload others first"
            )

    def _locate(self, path: str) -> tuple[Path, Path | None]:
        if self._folder is None:
            raise NoAdapterFolderError("no directory of adapters is set; start the stage with --adapter-dir")
        root = self._folder.resolve()
        asked = _resolve(root, root / path, path)
        if not path or not asked.exists():
            raise AdapterNotFoundError(f"path is {path[:256]!r}; nothing of that name is in the directory of adapters")
        weights, config = find_files(asked)
        return _resolve(root, weights, path), config and _resolve(root, config, path)

    def _read(self, weights: Path, config: Path | None) -> AdapterFile:
        anywhere = self._dit.scale_shift_table
        return read_adapter(weights, config, self._dit, device=anywhere.device, dtype=anywhere.dtype)


def _resolve(root: Path, found: Path, path: str) -> Path:
    """Follow links; raises InvalidRequestError, naming the `path` that was asked for, where they lead out of root."""
    try:
        real = found.resolve()
        real.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a null in it
        raise _bad_path(path, f"is no path ({type(error).__name__})") from error
    if not real.is_relative_to(root):
        raise _bad_path(path, "leads out of the directory of adapters; must stay inside")
    return real


def _bad_path(path: str, why: str) -> InvalidRequestError:
    return InvalidRequestError([Violation(field="path", description=f"is {path[:256]!r}, which {why}"[:512])])
