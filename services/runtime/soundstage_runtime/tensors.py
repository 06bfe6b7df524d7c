"""Tensors on the wire: raw little-endian bytes, a dtype from a short list, a shape that must match."""

import math

import numpy as np
from numpy.typing import NDArray

from soundstage.type.v1.tensor_pb2 import (
    DATA_TYPE_BFLOAT16,
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    DataType,
    LatentChunk,
    Tensor,
)
from soundstage_runtime.errors import InvalidRequestError, Violation

_WIRE_DTYPES = {
    DATA_TYPE_FLOAT32: np.dtype("<f4"),
    DATA_TYPE_FLOAT16: np.dtype("<f2"),
    DATA_TYPE_BFLOAT16: np.dtype("<u2"),
}
FRAMES_PER_CHUNK = 256


def to_proto(array: NDArray[np.float32], data_type: DataType.ValueType = DATA_TYPE_FLOAT32) -> Tensor:
    """Write an array of any shape as a Tensor; values a narrower type cannot hold are rounded to nearest even."""
    if data_type == DATA_TYPE_BFLOAT16:
        words = _to_bfloat16(array)
    else:
        words = np.ascontiguousarray(array, dtype=_WIRE_DTYPES[data_type])
    return Tensor(data_type=data_type, shape=array.shape, data=words.tobytes())


def from_proto(tensor: Tensor, field: str, *, shape: tuple[int | None, ...]) -> NDArray[np.float32]:
    """Read a Tensor as float32; None in `shape` takes any length. Raises InvalidRequestError naming `field`."""
    violations: list[Violation] = []

    def refuse(part: str, description: str) -> None:
        violations.append(Violation(field=f"{field}.{part}", description=description))

    dtype = _WIRE_DTYPES.get(tensor.data_type)
    if dtype is None:
        known = ", ".join(DataType.Name(value) for value in _WIRE_DTYPES)
        refuse("data_type", f"is {tensor.data_type}; must be one of {known}")
    found = tuple(tensor.shape)
    matches = len(found) == len(shape) and all(want in (None, have) for want, have in zip(shape, found, strict=True))
    if not matches or 0 in found:
        wanted = ", ".join("1 or more" if axis is None else str(axis) for axis in shape)
        refuse("shape", f"is {list(found[:8])}; must be [{wanted}]")
    elif dtype is not None and len(tensor.data) != math.prod(found) * dtype.itemsize:
        refuse("data", f"holds {len(tensor.data)} bytes; {list(found)} takes {math.prod(found) * dtype.itemsize}")
    if dtype is None or violations:
        raise InvalidRequestError(violations)
    words = np.frombuffer(tensor.data, dtype=dtype).reshape(found)
    if tensor.data_type == DATA_TYPE_BFLOAT16:
        values = (words.astype(np.uint32) << 16).view(np.float32)
    else:
        values = words.astype(np.float32)
    if not np.isfinite(values).all():
        refuse("data", "holds NaN or infinity; every element must be finite")
        raise InvalidRequestError(violations)
    return values


def latent_chunks(latents: NDArray[np.float32], data_type: DataType.ValueType) -> list[LatentChunk]:
    """Cut latents [frames, channels] into chunks of at most FRAMES_PER_CHUNK frames."""
    return [
        LatentChunk(first_frame=first, tensor=to_proto(latents[first : first + FRAMES_PER_CHUNK], data_type))
        for first in range(0, len(latents), FRAMES_PER_CHUNK)
    ]


def _to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(array), quiet_nan, rounded).astype("<u2")
