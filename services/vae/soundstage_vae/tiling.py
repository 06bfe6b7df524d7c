"""The one tile plan: how a song is cut for the codec, whoever asks and however it arrives."""

from dataclasses import dataclass
from typing import Final

# Latent frames that one output can depend on, each side. Decoder: 16 005 samples = 8.34 frames. Encoder: 12 165 = 6.34.
DECODE_CONTEXT: Final = 9
ENCODE_CONTEXT: Final = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A window to compute and the core of it to keep, in latent frames of the song."""

    window_start: int
    window_stop: int
    core_start: int
    core_stop: int


def plan_tiles(num_frames: int, *, window: int, context: int) -> list[Tile]:
    """Cut `num_frames` into windows of one constant length whose cores follow each other without gap or overlap.

    A core has `context` frames on each side of it in its window, but at the song's own ends. The last window is shifted
    back, never shrunk: one length takes one path through the kernels. A song shorter than a window is one window.
    """
    tiles: list[Tile] = []
    core_start = 0
    while core_start < num_frames:
        start = max(0, min(core_start - context, num_frames - window))
        stop = min(start + window, num_frames)
        core_stop = stop if stop == num_frames else stop - context
        tiles.append(Tile(window_start=start, window_stop=stop, core_start=core_start, core_stop=core_stop))
        core_start = core_stop
    return tiles
