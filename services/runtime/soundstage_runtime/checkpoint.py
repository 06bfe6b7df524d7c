"""Checkpoints on disk: where they are, what files they have, and their fingerprint."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from soundstage_runtime.errors import StartError

_HASHED_AT_ONCE: Final = 4  # files
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?:/[\w.-]+)*")


class CheckpointError(StartError):
    """A checkpoint is missing, incomplete, or not what its configuration says."""


def locate(model: str) -> Path:
    """Return the directory of a model given as a directory, or as a hub id `owner/name[/folder]`, which is fetched."""
    path = Path(model).expanduser()
    if model and path.is_dir():  # an empty name would be the working directory
        return path
    if path.is_absolute() or model.startswith(".") or not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"model is {model!r}: no such directory; give a directory or a hub id owner/name[/folder]"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, *folder = model.split("/")
    inside = "/".join(folder)
    try:
        root = snapshot_download(f"{owner}/{name}", allow_patterns=[f"{inside}/*"] if inside else None)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"model is {model!r}: no directory here, and the hub did not give it ({type(error).__name__}); "
            "is the network there? Else give a directory"
        ) from error
    found = Path(root) / inside
    if not found.is_dir():
        raise CheckpointError(f"model is {model!r}: {owner}/{name} has no folder {inside!r}")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def weight_files(folder: Path) -> list[Path]:
    """List a folder's safetensors files: one, or the shards that its index names. Raises CheckpointError."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = sorted(set(read_json(indexes[0]).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise CheckpointError(f"{indexes[0]} names shards that are missing: {', '.join(missing) or 'none at all'}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"{folder} holds {len(files)} safetensors files and no index; one is wanted")
    return files


class Fingerprints:
    """Fingerprints of files: each file is hashed once, on a thread beside whoever loads it meanwhile."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=_HASHED_AT_ONCE, thread_name_prefix="fingerprint")
        self._digests: dict[Path, Future[bytes]] = {}

    def begin(self, files: Iterable[Path]) -> Callable[[], str]:
        """Begin to hash files; what it returns waits for their fingerprint, a SHA-256 in hex, in the order given."""
        files = list(files)
        for path in files:
            if path not in self._digests:
                self._digests[path] = self._threads.submit(_digest, path)
        digests = [self._digests[path] for path in files]
        return lambda: hashlib.sha256(b"".join(digest.result() for digest in digests)).hexdigest()


def fingerprint(files: Iterable[Path]) -> str:
    """Hash files, in the order given, to a SHA-256 in hex."""
    return Fingerprints().begin(files)()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check_names(found: Iterable[str], wanted: Iterable[str], *, where: str) -> None:
    """Raise CheckpointError unless the two sets of tensor names are the same."""
    have, want = set(found), set(wanted)
    if have != want:
        raise CheckpointError(f"{where}: missing {_some(want - have)}; unexpected {_some(have - want)}")


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return "none" if not listed else ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
