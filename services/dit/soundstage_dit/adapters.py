"""The adapters that songs can be made with: loaded and forgotten while others are at work."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from soundstage_dit.adapter_card import AdapterCard
from soundstage_dit.adapter_file import AdapterFile, find_files, read_adapter
from soundstage_dit.model.adapter import Adaptation, Delta
from soundstage_dit.weights import LoadedModel
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


class AdapterMismatchError(ServiceError):
    """An adapter is for another model than the song's."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_MISMATCH"


class AdapterGoneError(ServiceError):
    """An adapter was unloaded since."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_GONE"


@dataclass(slots=True, kw_only=True, eq=False)
class _Adapter:
    card: AdapterCard
    model: LoadedModel
    deltas: Mapping[str, Delta] | None  # None once it is unloaded

    def adapt(self, scale: float) -> Adaptation:
        if self.deltas is None:
            name = self.card.name
            raise AdapterGoneError(f"the adapter {name!r} that was loaded when the song was asked for is unloaded")
        return Adaptation(deltas=self.deltas, scale=scale)


class Loan:
    """The very adapters that a song was found; one that is unloaded takes its memory with it."""

    def __init__(self, found: Sequence[tuple[_Adapter, float]]) -> None:
        self._found = found

    def adaptations(self) -> tuple[Adaptation, ...]:
        """Return the adapters at work; raises AdapterGoneError."""
        return tuple(adapter.adapt(scale) for adapter, scale in self._found)


class Adapters:
    """Loads adapters for models from below `folder`, at most `max_count`, of `max_bytes` in all."""

    def __init__(
        self,
        models: Sequence[LoadedModel],
        worker: Worker,
        *,
        folder: Path | None = None,
        max_count: int = 16,
        max_bytes: int = 4_000_000_000,
    ) -> None:
        self._models = {"": models[0]} | {model.model_fingerprint: model for model in models}
        self._worker = worker
        self._folder = folder
        self._max_count, self._max_bytes = max_count, max_bytes
        self._loaded: dict[str, _Adapter] = {}
        self._loading = asyncio.Lock()  # what is loaded next must know the size of what was loaded before

    def cards(self) -> list[AdapterCard]:
        """Tell what is loaded, by name."""
        return [self._loaded[name].card for name in sorted(self._loaded)]

    async def load(self, name: str, path: str, model_fingerprint: str = "") -> AdapterCard:
        """Load the adapter at `path` below the folder, for one of the models; the first where none is named.

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
            model = self._models[model_fingerprint]
            file = await self._worker.run(_read, weights, config, model)
            size_bytes = sum(delta.size_bytes for delta in file.deltas.values())
            self._check_room(name, size_bytes)
            card = AdapterCard(
                name=name,
                model_fingerprint=model.model_fingerprint,
                kind=file.kind,
                rank=file.rank,
                size_bytes=size_bytes,
            )
            self._loaded[name] = _Adapter(card=card, model=model, deltas=file.deltas)
            return card

    def unload(self, name: str) -> None:
        """Forget an adapter, but for songs that have it already; raises AdapterNotFoundError."""
        self._find("name", name).deltas = None
        del self._loaded[name]

    def find(self, uses: Sequence[tuple[str, float]], model_fingerprint: str = "") -> Loan:
        """Find the adapters of a song of a model, each a name and a scale.

        Raises AdapterNotFoundError and, where one is for another model, AdapterMismatchError.
        """
        model = self._models[model_fingerprint]
        found: list[tuple[_Adapter, float]] = []
        for index, (name, scale) in enumerate(uses):
            adapter = self._find(f"adapters[{index}].name", name)
            if adapter.model is not model:
                raise AdapterMismatchError(
                    f"adapters[{index}].name is {name!r}, which was loaded for the model {adapter.model.name}; the "
                    f"song is made with {model.name}: load it for that one, under another name"
                )
            if scale:
                found.append((adapter, scale))
        return Loan(found)

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


def _read(weights: Path, config: Path | None, model: LoadedModel) -> AdapterFile:
    return read_adapter(weights, config, model.dit, device=model.device, dtype=model.silence.dtype)


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
