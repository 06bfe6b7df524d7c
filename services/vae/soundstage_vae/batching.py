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


def choose_batch(decoder: BatchDecoder, windows: Sequence[int], max_batch: int) -> int:
    """Return `max_batch` if a batch of windows of each length has the bits of its windows alone, and 1 if not."""
    for frames in windows if max_batch > 1 else ():
        if not decoder.is_batching_exact(frames, max_batch):
            _log.info("batching_is_off", max_batch_tiles=max_batch, window_frames=frames, why="not exact to the bit")
            return 1
    return max_batch
