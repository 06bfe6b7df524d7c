"""PCM: float32 samples as bytes and back."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from soundstage.type.v1.audio_pb2 import (
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_UNSPECIFIED,
    AudioChunk,
    SampleFormat,
)
from soundstage_runtime.score import CHANNELS

FRAMES_PER_CHUNK: Final = 24_000
_FULL_SCALE: Final = 32_767
_DTYPES: Final = {
    SAMPLE_FORMAT_UNSPECIFIED: np.dtype("<i2"),
    SAMPLE_FORMAT_S16: np.dtype("<i2"),
    SAMPLE_FORMAT_F32: np.dtype("<f4"),
}
SAMPLE_FORMATS: Final = frozenset(_DTYPES)


def frame_size_bytes(sample_format: SampleFormat.ValueType) -> int:
    """Return what one stereo audio frame takes."""
    return CHANNELS * _DTYPES[sample_format].itemsize


def to_bytes(samples: NDArray[np.float32], sample_format: SampleFormat.ValueType) -> bytes:
    """Write samples [frames, 2]. S16 rounds half to even and clips at -32768 and 32767; F32 keeps every bit."""
    dtype = _DTYPES[sample_format]
    if dtype.kind == "i":
        samples = np.clip(np.rint(samples * np.float32(_FULL_SCALE)), -_FULL_SCALE - 1, _FULL_SCALE)
    return samples.astype(dtype).tobytes()


def from_bytes(data: bytes, sample_format: SampleFormat.ValueType) -> NDArray[np.float32]:
    """Read whole stereo frames as samples [frames, 2]."""
    dtype = _DTYPES[sample_format]
    samples = np.frombuffer(data, dtype).reshape(-1, CHANNELS).astype(np.float32)
    return samples / np.float32(_FULL_SCALE) if dtype.kind == "i" else samples


def audio_chunks(
    samples: NDArray[np.float32], *, first_frame: int, sample_format: SampleFormat.ValueType
) -> Iterator[tuple[AudioChunk, float]]:
    """Cut samples [frames, 2], whose place in the song is `first_frame`, into chunks of at most FRAMES_PER_CHUNK.

    Each comes with its peak before clipping; 1.0 is full scale.
    """
    for start in range(0, len(samples), FRAMES_PER_CHUNK):
        piece = samples[start : start + FRAMES_PER_CHUNK]
        data = to_bytes(piece, sample_format)
        yield AudioChunk(first_frame=first_frame + start, frame_count=len(piece), data=data), float(np.abs(piece).max())
