"""PCM: float32 samples as bytes and back."""

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from soundstage.type.v1.audio_pb2 import (
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_S24,
    SAMPLE_FORMAT_UNSPECIFIED,
    AudioChunk,
    SampleFormat,
)
from soundstage_runtime.score import CHANNELS

FRAMES_PER_CHUNK: Final = 24_000
_FULL_SCALE: Final = 32_767
_FULL_SCALE_S24: Final = 8_388_607
_SIZES_BYTES: Final = {
    SAMPLE_FORMAT_UNSPECIFIED: 2,
    SAMPLE_FORMAT_S16: 2,
    SAMPLE_FORMAT_F32: 4,
    SAMPLE_FORMAT_S24: 3,
}
SAMPLE_FORMATS: Final = frozenset(_SIZES_BYTES)


def frame_size_bytes(sample_format: SampleFormat.ValueType) -> int:
    """Return what one stereo audio frame takes."""
    return CHANNELS * _SIZES_BYTES[sample_format]


def to_s16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """Round samples of any shape, half to even, and clip them at -32768 and 32767."""
    return np.clip(np.rint(samples * np.float32(_FULL_SCALE)), -_FULL_SCALE - 1, _FULL_SCALE).astype("<i2")


def to_s24(samples: NDArray[np.float32]) -> NDArray[np.int32]:
    """Round samples of any shape, half to even, and clip them at -8388608 and 8388607."""
    exact = samples * np.float64(_FULL_SCALE_S24)  # float32 would round the product before it is rounded
    return np.clip(np.rint(exact), -_FULL_SCALE_S24 - 1, _FULL_SCALE_S24).astype("<i4")


def to_bytes(samples: NDArray[np.float32], sample_format: SampleFormat.ValueType) -> bytes:
    """Write samples [frames, channels]. S16 and S24 round and clip; F32 keeps every bit."""
    match sample_format:
        case SampleFormat.SAMPLE_FORMAT_F32:
            return samples.astype("<f4").tobytes()
        case SampleFormat.SAMPLE_FORMAT_S24:
            return to_s24(samples).reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
        case _:
            return to_s16(samples).tobytes()


def from_bytes(data: bytes, sample_format: SampleFormat.ValueType) -> NDArray[np.float32]:
    """Read whole stereo frames as samples [frames, 2]."""
    match sample_format:
        case SampleFormat.SAMPLE_FORMAT_F32:
            samples = np.frombuffer(data, "<f4").astype(np.float32)
        case SampleFormat.SAMPLE_FORMAT_S24:
            octets = np.frombuffer(data, np.uint8).reshape(-1, 3)
            words = np.pad(octets, ((0, 0), (1, 0))).view("<i4") >> 8  # the sign is in the highest byte
            samples = words.astype(np.float32) / np.float32(_FULL_SCALE_S24)
        case _:
            samples = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(_FULL_SCALE)
    return samples.reshape(-1, CHANNELS)


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
