"""Sounds: what requests name as sources and references, whether a file that was sent or a song."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Self

from soundstage_gateway.audio_file import Recording, Samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """How long a sound is, and whether it is known that nothing can be heard in it."""

    num_frames: int
    is_silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSound(Sound):
    """A sound that can be read: frames [start, stop), as pieces [n, 2]."""

    read: Callable[[int, int], AsyncGenerator[Samples, None]]

    @classmethod
    def of(cls, recording: Recording) -> Self:
        """Open a file that was sent."""

        async def read(start: int, stop: int) -> AsyncGenerator[Samples, None]:
            yield recording.samples[start:stop]

        return cls(num_frames=len(recording.samples), is_silent=recording.is_silent, read=read)
