"""The stretch of a stream that is held in memory."""

from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray


class Stretch:
    """Frames [frames, channels] of a stream, read by their place in it; what lies before the last read is let go."""

    def __init__(self, source: AsyncIterator[NDArray[np.float32]]) -> None:
        self._source = source
        self._held: NDArray[np.float32] | None = None
        self._first = 0

    async def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Await frames [start, stop); `start` never goes back. Raises EOFError when the stream ends before `stop`."""
        pieces = [] if self._held is None else [self._held]
        end = self._first + sum(map(len, pieces))
        while end < stop:
            piece = await anext(self._source, None)
            if piece is None:
                raise EOFError(f"the stream ended after {end} frames; {stop} were wanted")
            pieces.append(piece)
            end += len(piece)
        self._held = np.concatenate(pieces)[start - self._first :]
        self._first = start
        return self._held[: stop - start]
