"""Files of finished songs: they tell their length, and how much of the codec's delay and padding is not the song."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import av

from soundstage.type.v1.audio_pb2 import AudioFormat
from soundstage_gateway.audio_encoder import Track
from soundstage_gateway.audio_file import Samples


class SongFile:
    """A file that FFmpeg writes and may rewind, of samples [n, channels]."""

    def __init__(self, path: Path, container: str, options: Mapping[str, str], audio_format: AudioFormat) -> None:
        self._container = av.open(str(path), "w", container, {"fflags": "+bitexact", **options})
        self._track = Track(self._container, audio_format)

    def feed(self, samples: Samples) -> None:
        """Take the next samples."""
        self._container.mux(self._track.encode(samples))

    def close(self) -> None:
        """Write what is left, and what only the end tells."""
        self._container.mux(self._track.finish())
        self._container.close()

    def abandon(self) -> None:
        """Let go of it as it is, closed or not."""
        with suppress(OSError):
            self._container.close()
