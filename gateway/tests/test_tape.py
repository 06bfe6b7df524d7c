"""Tapes: what is decoded is decoded once, and read in any range while it grows."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest

from soundstage_gateway.audio_file import Samples
from soundstage_gateway.tape import Decode, Tape, Tapes

SONG = np.random.default_rng(0).uniform(-1, 1, (4_000_000, 2)).astype(np.float32)
PIECE = 7_001


class Decoder:
    """Decodes SONG, a piece at a time, as far as it is let."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.closed = asyncio.Event()
        self.limit = len(SONG)
        self.more = asyncio.Event()

    def let(self, limit: int) -> None:
        self.limit = limit
        self.more.set()
        self.more = asyncio.Event()

    async def decode(self, start: int, stop: int) -> AsyncGenerator[Samples, None]:
        self.asked.append((start, stop))
        try:
            while start < stop:
                while start >= self.limit:
                    await self.more.wait()
                end = min(start + PIECE, stop, self.limit)
                yield SONG[start:end]
                await asyncio.sleep(0)
                start = end
        finally:
            self.closed.set()


async def broken(start: int, stop: int) -> AsyncGenerator[Samples, None]:
    yield SONG[start : start + 10]
    raise ValueError("out of order")


async def short(start: int, stop: int) -> AsyncGenerator[Samples, None]:
    yield SONG[start : start + 10]


def open_tape(folder: Path, decode: Decode, num_frames: int = len(SONG)) -> Tape:
    return Tape(folder / "tape", num_frames, decode)


async def read(tape: Tape, start: int, stop: int) -> Samples:
    return np.concatenate([piece async for piece in tape.read(start, stop)])


async def test_readers_at_once_and_later_get_the_same_frames_of_one_decoding(tmp_path: Path) -> None:
    decoder = Decoder()
    tape = open_tape(tmp_path, decoder.decode, 300_000)
    spans = [(0, 300_000), (5, 6), (24_000, 48_000), (299_999, 300_000)]
    found = await asyncio.gather(*(read(tape, *span) for span in spans))
    assert all(np.array_equal(samples, SONG[slice(*span)]) for samples, span in zip(found, spans, strict=True))
    assert np.array_equal(await read(tape, 100, 290_000), SONG[100:290_000])
    assert decoder.asked == [(0, 300_000)]
    assert tape.is_whole
    assert tape.peak == np.abs(SONG[:300_000]).max()
    tape.close()


async def test_frames_are_read_as_soon_as_they_are_there(tmp_path: Path) -> None:
    decoder = Decoder()
    decoder.let(PIECE)
    tape = open_tape(tmp_path, decoder.decode)
    async with aclosing(tape.read(0, 100_000)) as pieces:
        assert len(await anext(pieces)) == PIECE
        decoder.let(PIECE + 1)
        assert len(await anext(pieces)) == 1
    tape.close()


async def test_nobody_listening_stops_the_decoding_and_the_next_goes_on_where_it_was(tmp_path: Path) -> None:
    decoder = Decoder()
    decoder.let(20_000)
    tape = open_tape(tmp_path, decoder.decode, 300_000)
    async with aclosing(tape.read(0, 300_000)) as pieces:
        await anext(pieces)
    await asyncio.wait_for(decoder.closed.wait(), 5)
    assert not tape.is_read
    decoder.let(len(SONG))
    assert np.array_equal(await read(tape, 0, 300_000), SONG[:300_000])
    assert [start for start, _ in decoder.asked] == [0, decoder.asked[1][0]]
    assert decoder.asked[1][0] > 0
    tape.close()


async def test_a_range_far_ahead_does_not_wait_for_what_lies_before(tmp_path: Path) -> None:
    decoder = Decoder()
    tape = open_tape(tmp_path, decoder.decode)
    assert np.array_equal(await read(tape, 3_000_000, 3_001_000), SONG[3_000_000:3_001_000])
    assert decoder.asked == [(3_000_000, 3_001_000)]
    tape.close()


@pytest.mark.parametrize(("decode", "error"), [(broken, ValueError), (short, EOFError)])
async def test_what_goes_wrong_in_the_decoding_reaches_every_reader(
    tmp_path: Path, decode: Decode, error: type[Exception]
) -> None:
    tape = open_tape(tmp_path, decode, 30_000)
    found = await asyncio.gather(*(read(tape, 0, 30_000) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in found] == [error] * 3
    tape.close()


async def test_the_peak_is_that_of_the_whole_song(tmp_path: Path) -> None:
    tape = open_tape(tmp_path, Decoder().decode, 200_000)
    assert await tape.find_peak() == np.abs(SONG[:200_000]).max()
    tape.close()


async def test_an_overview_shows_the_lowest_and_highest_samples_of_what_is_there(tmp_path: Path) -> None:
    decoder = Decoder()
    decoder.let(50_000)
    tape = open_tape(tmp_path, decoder.decode, 100_000)
    async with aclosing(tape.read(0, 100_000)) as pieces:
        while tape.num_ready < 50_000:
            await anext(pieces)
    found = tape.overview(10)
    wanted = [(SONG[n * 10_000 : (n + 1) * 10_000].min(), SONG[n * 10_000 : (n + 1) * 10_000].max()) for n in range(5)]
    assert np.array_equal(found, np.array(wanted))
    tape.close()


async def test_the_least_used_tapes_make_room_but_not_those_that_are_read(tmp_path: Path) -> None:
    tapes = Tapes(tmp_path, limit_bytes=3 * 8 * 1000)
    opened = [tapes.open("songs/a", number, 1000, Decoder().decode) for number in range(3)]
    assert tapes.open("songs/a", 0, 1000, Decoder().decode) is opened[0]
    async with aclosing(opened[1].read(0, 1000)) as pieces:
        await anext(pieces)
        tapes.open("songs/b", 0, 1000, Decoder().decode)  # the third of the first song goes
        assert tapes.open("songs/a", 1, 1000, Decoder().decode) is opened[1]
        assert tapes.open("songs/a", 2, 1000, Decoder().decode) is not opened[2]
        assert tapes.open("songs/a", 0, 1000, Decoder().decode) is not opened[0]
    tapes.close()
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240
