"""WAV files that were written as streams."""

import os
from typing import BinaryIO, Final

_RIFF_SIZE_AT: Final = 4
_LAYOUT_SIZE_AT: Final = 16
_LAYOUT_AT: Final = 20
_MAX_UINT32: Final = 2**32 - 1


def write_lengths(file: BinaryIO) -> None:
    """Write true lengths into a WAV file's header, which said that nobody knew them."""
    size_bytes = file.seek(0, os.SEEK_END)
    file.seek(_LAYOUT_SIZE_AT)
    audio_at = _LAYOUT_AT + int.from_bytes(file.read(4), "little") + 8
    if not audio_at <= size_bytes <= _MAX_UINT32:
        return
    audio_bytes = size_bytes - audio_at
    if audio_bytes % 2:  # a RIFF chunk is padded to whole words
        file.seek(0, os.SEEK_END)
        file.write(b"\0")
    for at, value in ((_RIFF_SIZE_AT, size_bytes + audio_bytes % 2 - 8), (audio_at - 4, audio_bytes)):
        file.seek(at)
        file.write(value.to_bytes(4, "little"))
