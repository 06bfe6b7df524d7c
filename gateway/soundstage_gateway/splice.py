"""The splice: after a repaint, the source's own samples outside of the window."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np

from soundstage_gateway.audio_file import Samples
from soundstage_gateway.canvas import Canvas

_PLACE: Final = "splice.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Splice:
    """Keeps a source outside of frames [start, end), but for crossfades of `fade_frames` before and after them."""

    canvas: Canvas
    start: int
    end: int
    fade_frames: int

    def apply(self, made: Samples, source: Samples, first_frame: int) -> Samples:
        """Splice samples [n, 2], made for frames from `first_frame` on; what is kept is kept to the bit."""
        frames = np.arange(first_frame, first_frame + len(made))
        outside = np.maximum(self.start - frames, frames - (self.end - 1))  # frames away from the window; 0 in it
        share = np.clip(1 - outside / (self.fade_frames + 1), 0, 1).astype(np.float32)[:, None]
        kept = self.canvas.cut(source, first_frame, first_frame + len(made))
        mixed = share * made + (1 - share) * kept
        return np.where(share == 0, kept, np.where(share == 1, made, mixed))

    def write(self, folder: Path) -> None:
        """Write it into a folder, for `read`."""
        place = asdict(self)
        (folder / _PLACE).write_text(json.dumps(place.pop("canvas") | place))

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete what `write` has written, if it has."""
        (folder / _PLACE).unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read what `write` has written; None when there is nothing."""
        if not (folder / _PLACE).exists():
            return None
        place = json.loads((folder / _PLACE).read_text())
        canvas = Canvas(lead_frames=place["lead_frames"], num_frames=place["num_frames"])
        return cls(canvas=canvas, start=place["start"], end=place["end"], fade_frames=place["fade_frames"])
