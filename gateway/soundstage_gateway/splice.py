"""The splice: after a repaint, the source's own samples outside of the window."""

from dataclasses import dataclass

import numpy as np

from soundstage_gateway.audio_file import Samples
from soundstage_gateway.canvas import Canvas


@dataclass(frozen=True, slots=True, kw_only=True)
class Splice:
    """Keeps a source outside of frames [start, end), but for crossfades of `fade_frames` before and after them."""

    source: Canvas
    start: int
    end: int
    fade_frames: int

    def apply(self, made: Samples, first_frame: int) -> Samples:
        """Splice samples [n, 2], made for frames from `first_frame` on; what is kept is kept to the bit."""
        frames = np.arange(first_frame, first_frame + len(made))
        outside = np.maximum(self.start - frames, frames - (self.end - 1))  # frames away from the window; 0 in it
        share = np.clip(1 - outside / (self.fade_frames + 1), 0, 1).astype(np.float32)[:, None]
        source = self.source.cut(first_frame, first_frame + len(made))
        mixed = share * made + (1 - share) * source
        return np.where(share == 0, source, np.where(share == 1, made, mixed))
