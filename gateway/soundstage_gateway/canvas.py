"""A canvas: what a task works on, as long as the song will be."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from soundstage_gateway.audio_file import Samples
from soundstage_runtime.score import CHANNELS, SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A source that begins at frame `lead_frames` of `num_frames`; the rest is silence."""

    lead_frames: int
    num_frames: int

    @property
    def duration_s(self) -> float:
        """How long it is, silence included."""
        return self.num_frames / SAMPLE_RATE_HZ

    def cut(self, source: Samples, start: int, end: int) -> Samples:
        """Return frames [start, end), the source's samples [n, 2] among them."""
        first, last = (min(max(frame - self.lead_frames, 0), len(source)) for frame in (start, end))
        if last - first == end - start:
            return source[first:last]
        piece = np.zeros((end - start, CHANNELS), np.float32)
        offset = first + self.lead_frames - start
        piece[offset : offset + last - first] = source[first:last]
        return piece

    def pieces(self, source: Samples, size: int) -> Iterator[Samples]:
        """Yield all frames in order, at most `size` at a time."""
        for start in range(0, self.num_frames, size):
            yield self.cut(source, start, min(start + size, self.num_frames))
