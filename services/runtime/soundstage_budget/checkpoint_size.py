"""How many numbers a checkpoint holds, from its files' headers alone."""

import json
import math
import struct
from pathlib import Path

from soundstage_runtime.checkpoint import CheckpointError, weight_files


def count_parameters(folder: Path) -> dict[str, int]:
    """Count the numbers of every tensor in a folder's safetensors, by name; raises CheckpointError."""
    return {name: count for path in weight_files(folder) for name, count in _read_header(path).items()}


def file_bytes(folder: Path) -> int:
    """Return the size of a folder's safetensors; raises CheckpointError."""
    return sum(path.stat().st_size for path in weight_files(folder))


def _read_header(path: Path) -> dict[str, int]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, path.stat().st_size)))
        return {name: math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has no safetensors header; is it cut short? Fetch it again") from error
