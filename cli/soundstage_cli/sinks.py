"""Where PCM goes: a WAV file for every variant, or raw bytes to a pipe."""

from pathlib import Path
from typing import BinaryIO, Protocol

import soundfile

from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_S16, AudioChunk, AudioHeader


class Sink(Protocol):
    """Takes the audio of one variant, in order."""

    def begin(self, header: AudioHeader) -> None:
        """Take the header, before any chunk."""
        ...

    def write(self, chunk: AudioChunk) -> None:
        """Take a chunk."""
        ...

    def close(self) -> None:
        """Finish; what was written stays valid, even if the song was cut short."""
        ...


class WavFile:
    """Writes a WAV file as the audio comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: soundfile.SoundFile | None = None
        self._is_s16 = True

    def begin(self, header: AudioHeader) -> None:
        """Open the file."""
        written = header.format
        self._is_s16 = written.sample_format == SAMPLE_FORMAT_S16
        subtype = "PCM_16" if self._is_s16 else "FLOAT"
        self._file = soundfile.SoundFile(
            self.path, "w", samplerate=written.sample_rate_hz, channels=written.channels, subtype=subtype, format="WAV"
        )

    def write(self, chunk: AudioChunk) -> None:
        """Append a chunk."""
        assert self._file is not None, "a chunk came before its header"
        self._file.buffer_write(chunk.data, "int16" if self._is_s16 else "float32")

    def close(self) -> None:
        """Write the final sizes."""
        if self._file is not None:
            self._file.close()


class RawPipe:
    """Writes interleaved PCM and nothing else, for a player that is told the format."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe

    def begin(self, header: AudioHeader) -> None:
        """Raw PCM has no header."""

    def write(self, chunk: AudioChunk) -> None:
        """Pass a chunk on at once."""
        self._pipe.write(chunk.data)
        self._pipe.flush()

    def close(self) -> None:
        """The pipe is its owner's to close."""
