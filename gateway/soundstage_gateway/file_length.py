"""What files tell about their own length, where decoders make do with less."""

import io
import struct
from typing import BinaryIO, Final

_OPEN_SIZES: Final = (0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)  # what writes of a stream cannot know
_LONGEST_PAGE_BYTES: Final = 27 + 255 + 255 * 255
_LAST_PAGE: Final = 4


def is_cut(file: BinaryIO) -> bool:
    """Whether a WAV or Ogg file ends before its end; of others decoders notice by themselves."""
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        return _is_wave_cut(file)
    return head[:4] == b"OggS" and _is_ogg_cut(file)


def tells_length(file: BinaryIO) -> bool:
    """Whether what a decoder says of a file's length is from the file; of bare MP3 it guesses, by a few bit rates."""
    file.seek(0)
    head = file.read(10)
    if head[:3] == b"ID3":
        high, middle, low, lowest = head[6:10].ljust(4, b"\0")
        file.seek(10 + (high << 21 | middle << 14 | low << 7 | lowest))
        head = file.read(10)
    if head[:1] != b"\xff" or head[1:2] < b"\xe0":
        return True
    first_frame = file.read(200)
    return any(tag in first_frame for tag in (b"Xing", b"Info", b"VBRI"))


def _is_wave_cut(file: BinaryIO) -> bool:
    """Walk through the chunks to the samples; sizes that mean "unknown" are no promise."""
    num_bytes = file.seek(0, io.SEEK_END)
    place = 12
    while place + 8 <= num_bytes:
        file.seek(place)
        name, size_bytes = struct.unpack("<4sI", file.read(8))
        place += 8 + size_bytes + size_bytes % 2
        if name == b"data":
            return size_bytes not in _OPEN_SIZES and place - size_bytes % 2 > num_bytes
    return False


def _is_ogg_cut(file: BinaryIO) -> bool:
    """Look at the last page: it must be whole, and marked as the last."""
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(max(0, num_bytes - _LONGEST_PAGE_BYTES))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return True
    page_bytes = 27 + page[26] + sum(page[27 : 27 + page[26]])
    return not page[5] & _LAST_PAGE or len(page) < page_bytes
