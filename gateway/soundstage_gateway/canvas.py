"""A canvas: what a task works on, as long as the song will be."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from soundstage_gateway.audio_file import Samples
from soundstage_runtime.score import CHANNELS, SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A source of samples [n, 2] that begins at frame `lead_frames` of `num_frames`; the rest is silence."""

    samples: Samples
    is_silent: bool
    lead_frames: int
    num_frames: int

    @property
    def duration_s(self) -> float:
        """How long it is, silence included."""
        return self.num_frames / SAMPLE_RATE_HZ

    def cut(self, start: int, end: int) -> Samples:
        """Return frames [start, end)."""
        first, last = (min(max(frame - self.lead_frames, 0), len(self.samples)) for frame in (start, end))
        if last - first == end - start:
            return self.samples[first:last]
        piece = np.zeros((end - start, CHANNELS), np.float32)
        offset = first + self.lead_frames - start
        piece[offset : offset + last - first] = self.samples[first:last]
        return piece

    def pieces(self, size: int) -> Iterator[Samples]:
        """Yield all frames in order, at most `size` at a time."""
        for start in range(0, self.num_frames, size):
            yield self.cut(start, min(start + size, self.num_frames))
