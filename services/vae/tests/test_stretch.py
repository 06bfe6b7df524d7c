from collections.abc import AsyncIterator

import numpy as np
import pytest
from numpy.typing import NDArray

from soundstage_vae.stretch import Stretch

FRAMES = np.arange(20, dtype=np.float32).reshape(10, 2)


class Tape:
    """Plays frames in runs of one length, and counts what it has played."""

    def __init__(self, frames: NDArray[np.float32], run: int) -> None:
        self.frames, self.run, self.played = frames, run, 0

    async def __aiter__(self) -> AsyncIterator[NDArray[np.float32]]:
        while self.played < len(self.frames):
            start, self.played = self.played, min(self.played + self.run, len(self.frames))
            yield self.frames[start : self.played]


@pytest.mark.parametrize("run", [1, 3, 10])
async def test_reads_frames_by_their_place_however_they_come(run: int) -> None:
    stretch = Stretch(aiter(Tape(FRAMES, run)))
    for start, stop in ((0, 4), (2, 6), (6, 6), (7, 10)):
        assert np.array_equal(await stretch.read(start, stop), FRAMES[start:stop])


async def test_asks_for_no_more_than_it_needs() -> None:
    tape = Tape(FRAMES, run=1)
    await Stretch(aiter(tape)).read(0, 4)
    assert tape.played == 4


async def test_says_where_a_stream_ended_too_early() -> None:
    with pytest.raises(EOFError, match="ended after 10 frames; 11 were wanted"):
        await Stretch(aiter(Tape(FRAMES, run=4))).read(0, 11)
