"""The one tile plan: how a song is cut for the codec, whoever asks and however it arrives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from soundstage_runtime.score import SAMPLES_PER_LATENT

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

    @property
    def core(self) -> range:
        """The frames of the window that are the core's."""
        return range(self.core_start - self.window_start, self.core_stop - self.window_start)

    def keep(self, wanted: range) -> slice:
        """Say which audio frames of the core's are wanted."""
        first, stop = (place * SAMPLES_PER_LATENT for place in (self.core_start, self.core_stop))
        return slice(max(first, wanted.start) - first, min(stop, wanted.stop) - first)


def window_lengths(first: int, largest: int) -> tuple[int, ...]:
    """List the lengths of a song's windows: `first`, doubled each time until it is `largest`."""
    lengths: list[int] = []
    while first < largest:
        lengths.append(first)
        first *= 2
    return (*lengths, largest)


def plan_tiles(num_frames: int, *, windows: Sequence[int], context: int) -> list[Tile]:
    """Cut `num_frames` into tiles whose cores follow each other without gap or overlap.

    Their windows have the lengths `windows`, which grow, and then the last of these; at the song's end a shorter one of
    those had so far will do. A core has `context` frames on each side of it in its window, but at the song's own ends.
    The last window is shifted back, never shrunk: few lengths take few paths through the kernels; but never behind the
    one before, so that a stream need not be kept. A song shorter than the first window is one window.
    """
    tiles: list[Tile] = []
    core_start = 0
    while core_start < num_frames:
        start = max(0, core_start - context)
        before = tiles[-1].window_start if tiles else 0
        lengths = [length for length in windows[: len(tiles) + 1] if before <= max(0, num_frames - length)]
        length = next((length for length in lengths if start + length >= num_frames), lengths[-1])
        start = max(0, min(start, num_frames - length))
        stop = min(start + length, num_frames)
        core_stop = stop if stop == num_frames else stop - context
        tiles.append(Tile(window_start=start, window_stop=stop, core_start=core_start, core_stop=core_stop))
        core_start = core_stop
    return tiles


def usual_cores(window_frames: int, context: int) -> list[range]:
    """List the cores that windows of a length have: at the start of a song, and further on but at its end."""
    stop = window_frames - context
    return [range(start, stop) for start in (0, context) if start < stop]


def touching(tiles: Sequence[Tile], wanted: range) -> list[Tile]:
    """Choose the tiles whose cores hold some of the wanted audio frames."""
    first, last = wanted[0] // SAMPLES_PER_LATENT, wanted[-1] // SAMPLES_PER_LATENT
    return [tile for tile in tiles if tile.core_start <= last and first < tile.core_stop]
