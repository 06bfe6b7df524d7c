"""Files that clients should not send: cut, mislabelled, lying about what they hold, or made to hurt."""

import io
import struct
from collections.abc import Sequence
from typing import Final

import av
import numpy as np
import soundfile

from .files import m4a, sound_file, tone, words

FLAC: Final = sound_file(words(48_000), 48_000, "FLAC", "PCM_16")
WAV: Final = sound_file(words(48_000), 48_000, "WAV")
M4A: Final = m4a(tone(1, 48_000, 2), 48_000, codec="aac")
WHOLE: Final = {
    "wav": WAV,
    "flac": FLAC,
    "mp3": sound_file(tone(1, 44_100, 2), 44_100, "MP3"),
    "vorbis": sound_file(tone(1, 44_100, 2), 44_100, "OGG", "VORBIS"),
    "opus": sound_file(tone(1, 48_000, 2), 48_000, "OGG", "OPUS"),
    "aac": M4A,
    "alac": m4a(tone(1, 48_000, 2), 48_000),
}


def told_to_be(flac: bytes, num_frames: int) -> bytes:
    """Change the length in a FLAC file's header; 0 is unknown."""
    (word,) = struct.unpack_from(">Q", flac, 18)
    return flac[:18] + struct.pack(">Q", word >> 36 << 36 | num_frames) + flac[26:]


def with_cover(flac: bytes) -> bytes:
    """Put a picture behind the first block of a FLAC file's header."""
    fields = (b"image/png", b"a cover")
    texts = b"".join(struct.pack(">I", len(text)) + text for text in fields)
    picture = struct.pack(">I", 3) + texts + struct.pack(">5I", 1, 1, 24, 0, 5000) + bytes(5000)
    return flac[:42] + struct.pack(">I", 6 << 24 | len(picture)) + picture + flac[42:]


def with_rate(rate_hz: int) -> bytes:
    """A WAV file with a rate that no card has."""
    return WAV[:24] + struct.pack("<I", rate_hz) + WAV[28:]


def of_64_bits() -> bytes:
    """A WAV file of integers so long that nobody else writes them."""
    layout = struct.pack("<HHIIHH", 1, 2, 48_000, 48_000 * 16, 16, 64)
    return WAV[:20] + layout + WAV[36:]


def silence(duration_s: int) -> bytes:
    """Nothing, in FLAC at 8 kHz: one MB takes a day."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(duration_s // 60):
            file.write(np.zeros(60 * 8_000, np.int16))
    return buffer.getvalue()


def video() -> bytes:
    """A film without sound."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def box(kind: bytes, body: bytes = b"") -> bytes:
    """A box of an MP4 file."""
    return struct.pack(">I4s", 8 + len(body), kind) + body


_MP4_START: Final = box(b"ftyp", b"isom\0\0\0\0isom")
VAST_BOX: Final = _MP4_START + struct.pack(">I4sQ", 1, b"moov", 2**62) + bytes(100)
NESTED_BOXES: Final = _MP4_START + b"".join(struct.pack(">I4s", 8 * left, b"moov") for left in range(100_000, 0, -1))


def with_samples(count: int) -> bytes:
    """An MP4 file of some kilobytes whose tables tell of `count` samples of a byte each."""
    data = M4A
    for kind, numbers in (
        (b"stsz", (1, count)),
        (b"stts", (1, count, 1024)),
        (b"stsc", (1, 1, count, 1)),
        (b"stco", (1, 100)),
    ):
        data = _with_table(data, kind, numbers)
    return data


def _with_table(mp4: bytes, kind: bytes, numbers: Sequence[int]) -> bytes:
    """Put another table in a table's place, and fill up what is left of it."""
    start = mp4.index(kind) - 4
    (size_bytes,) = struct.unpack_from(">I", mp4, start)
    table = box(kind, struct.pack(f">I{len(numbers)}I", 0, *numbers))
    rest = size_bytes - len(table)
    filling = box(b"free", bytes(rest - 8)) if rest else b""
    return mp4[:start] + table + filling + mp4[start + size_bytes :]
