"""Whether tiles of several songs may share a forward: only where that leaves no trace in the samples."""

from collections.abc import Sequence
from typing import Protocol

import structlog

_log = structlog.stdlib.get_logger()


class BatchDecoder(Protocol):
    """Decodes windows alone or in a batch."""

    def is_batching_exact(self, window_frames: int, batch: int) -> bool:
        """Say whether windows in a batch get the bits that they get alone."""
        ...


def choose_batches(decoder: BatchDecoder, windows: Sequence[int], max_batch: int) -> dict[int, int]:
    """Return how many windows of each length may be decoded at once, up to `max_batch`.

    That many have the bits of the windows alone, and so has every smaller number: all are tried.
    """
    found: dict[int, int] = {}
    for frames in windows:
        inexact = (batch for batch in range(2, max_batch + 1) if not decoder.is_batching_exact(frames, batch))
        found[frames] = next(inexact, max_batch + 1) - 1
        if found[frames] < max_batch:
            _log.info(
                "batches_are_small", window_frames=frames, tiles=found[frames], why="more are not exact to the bit"
            )
    return found
