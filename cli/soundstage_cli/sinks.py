"""Where audio goes: files, and a pipe."""

from pathlib import Path
from typing import BinaryIO, Protocol

from soundstage.type.v1.audio_pb2 import ENCODING_WAV, AudioChunk, AudioHeader
from soundstage_runtime.wav import write_lengths


class Sink(Protocol):
    """Takes the audio of one variant, in order."""

    async def begin(self, header: AudioHeader) -> None:
        """Take the header, before any chunk. When it comes again, the audio starts over."""
        ...

    async def write(self, chunk: AudioChunk) -> None:
        """Take a chunk."""
        ...


class StartOverError(Exception):
    """What has gone down a pipe cannot be taken back."""


class AudioFile:
    """Writes a file as the audio comes, from its header on. A context manager; a song cut short is a valid file too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._is_wav = False

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with self._file:
                if self._is_wav:
                    write_lengths(self._file)

    @property
    def is_begun(self) -> bool:
        """Whether audio has come, so that there is a file."""
        return self._file is not None

    async def begin(self, header: AudioHeader) -> None:
        """Open the file, or empty it."""
        if self._file is not None:
            self._file.close()
        self._file = self.path.open("w+b")
        self._is_wav = header.format.encoding == ENCODING_WAV

    async def write(self, chunk: AudioChunk) -> None:
        """Append a chunk."""
        assert self._file is not None, "a chunk came before its header"
        self._file.write(chunk.data)


class Pipe:
    """Passes on the bytes of one stream and nothing else."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._is_begun = False

    async def begin(self, header: AudioHeader) -> None:
        """Begin, once; raises StartOverError."""
        if self._is_begun:
            raise StartOverError("the connection was lost, and on a pipe only pcm and wav can go on after that")
        self._is_begun = True

    async def write(self, chunk: AudioChunk) -> None:
        """Pass a chunk on at once."""
        self._pipe.write(chunk.data)
        self._pipe.flush()
