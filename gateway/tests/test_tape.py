"""Tapes: what is decoded is decoded once, and read in any range while it grows."""

import asyncio
import resource
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractContextManager, aclosing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from soundstage_gateway.audio_file import Samples
from soundstage_gateway.disk import DiskFullError
from soundstage_gateway.tape import Decode, Tape, Tapes
from soundstage_runtime.call import Call, enter, next_hop

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


@contextmanager
def open_tape(folder: Path, decode: Decode, num_frames: int = len(SONG)) -> Generator[Tape]:
    tape = Tape(folder / "tape", num_frames, decode)
    with tape.hold():
        yield tape
    tape.remove()


async def read(tape: Tape, start: int, stop: int) -> Samples:
    return np.concatenate([piece async for piece in tape.read(start, stop)])


async def test_readers_at_once_and_later_get_the_same_frames_of_one_decoding(tmp_path: Path) -> None:
    decoder = Decoder()
    with open_tape(tmp_path, decoder.decode, 300_000) as tape:
        spans = [(0, 300_000), (5, 6), (24_000, 48_000), (299_999, 300_000)]
        found = await asyncio.gather(*(read(tape, *span) for span in spans))
        assert all(np.array_equal(samples, SONG[slice(*span)]) for samples, span in zip(found, spans, strict=True))
        assert np.array_equal(await read(tape, 100, 290_000), SONG[100:290_000])
        assert decoder.asked == [(0, 300_000)]
        assert tape.is_whole
        assert tape.peak == np.abs(SONG[:300_000]).max()


async def test_frames_are_read_as_soon_as_they_are_there(tmp_path: Path) -> None:
    decoder = Decoder()
    decoder.let(PIECE)
    with open_tape(tmp_path, decoder.decode) as tape:
        async with aclosing(tape.read(0, 100_000)) as pieces:
            assert len(await anext(pieces)) == PIECE
            decoder.let(PIECE + 1)
            assert len(await anext(pieces)) == 1


async def test_nobody_listening_stops_the_decoding_and_the_next_goes_on_where_it_was(tmp_path: Path) -> None:
    decoder = Decoder()
    decoder.let(20_000)
    tape = Tape(tmp_path / "tape", 300_000, decoder.decode)
    with tape.hold():
        async with aclosing(tape.read(0, 300_000)) as pieces:
            await anext(pieces)
    await asyncio.wait_for(decoder.closed.wait(), 5)
    assert not tape.is_held
    decoder.let(len(SONG))
    with tape.hold():
        assert np.array_equal(await read(tape, 0, 300_000), SONG[:300_000])
    assert [start for start, _ in decoder.asked] == [0, decoder.asked[1][0]]
    assert decoder.asked[1][0] > 0


async def test_the_first_readers_deadline_is_not_the_decodings(tmp_path: Path) -> None:
    limits_s: list[float | None] = []

    async def decode(start: int, stop: int) -> AsyncGenerator[Samples, None]:
        limits_s.append(next_hop().timeout_s)
        yield SONG[start:stop]

    enter(Call(request_id="first", deadline_s=time.monotonic() + 1))
    with open_tape(tmp_path, decode, 1000) as tape:
        await read(tape, 0, 1000)
        assert next_hop().timeout_s is not None
    assert limits_s == [None]


async def test_a_full_disk_is_told_and_nothing_is_called_whole(tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_tape(tmp_path, Decoder().decode, 300_000) as tape:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 * 8, unlimited[1]))
        try:
            with pytest.raises(DiskFullError):
                await read(tape, 0, 300_000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert 0 < tape.num_ready <= 100_000


async def test_a_range_far_ahead_does_not_wait_for_what_lies_before(tmp_path: Path) -> None:
    decoder = Decoder()
    with open_tape(tmp_path, decoder.decode) as tape:
        assert np.array_equal(await read(tape, 3_000_000, 3_001_000), SONG[3_000_000:3_001_000])
        assert decoder.asked == [(3_000_000, 3_001_000)]


@pytest.mark.parametrize(("decode", "error"), [(broken, ValueError), (short, EOFError)])
async def test_what_goes_wrong_in_the_decoding_reaches_every_reader(
    tmp_path: Path, decode: Decode, error: type[Exception]
) -> None:
    with open_tape(tmp_path, decode, 30_000) as tape:
        found = await asyncio.gather(*(read(tape, 0, 30_000) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in found] == [error] * 3


async def test_the_peak_is_that_of_the_whole_song(tmp_path: Path) -> None:
    with open_tape(tmp_path, Decoder().decode, 200_000) as tape:
        assert await tape.find_peak() == np.abs(SONG[:200_000]).max()


async def test_an_overview_shows_the_lowest_and_highest_samples_of_what_is_there(tmp_path: Path) -> None:
    decoder = Decoder()
    decoder.let(50_000)
    with open_tape(tmp_path, decoder.decode, 100_000) as tape:
        async with aclosing(tape.read(0, 100_000)) as pieces:
            while tape.num_ready < 50_000:
                await anext(pieces)
        found = tape.overview(10)
        wanted = [
            (SONG[n * 10_000 : (n + 1) * 10_000].min(), SONG[n * 10_000 : (n + 1) * 10_000].max()) for n in range(5)
        ]
        assert np.array_equal(found, np.array(wanted))


async def test_the_least_used_tapes_make_room_but_not_those_that_are_held(tmp_path: Path) -> None:
    tapes = Tapes(tmp_path, limit_bytes=3 * 8 * 1000)

    def hold(song: str, variant: int) -> AbstractContextManager[Tape]:
        return tapes.hold(song, variant, 1000, Decoder().decode)

    found: list[Tape] = []
    for number in range(3):
        with hold("songs/a", number) as tape:
            found.append(tape)
    with hold("songs/a", 0) as first, hold("songs/a", 1) as second:
        assert [first, second] == found[:2]
        with hold("songs/b", 0), hold("songs/c", 0):  # the third of the first song goes, and then nobody can
            samples = await asyncio.gather(*(read(tape, 0, 1000) for tape in (first, second)))
        assert all(np.array_equal(one, SONG[:1000]) for one in samples)
        with hold("songs/a", 2) as third:
            assert third is not found[2]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 3 * 8 * 1000  # noqa: ASYNC240
    tapes.close()
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


async def test_those_that_hold_a_removed_tape_read_on(tmp_path: Path) -> None:
    tapes = Tapes(tmp_path, limit_bytes=1 << 20)
    with tapes.hold("songs/a", 0, 100_000, Decoder().decode) as tape:
        async with aclosing(tape.read(0, 100_000)) as pieces:
            await anext(pieces)
            tapes.remove("songs/a")
            assert not any(tmp_path.iterdir())  # noqa: ASYNC240
            with tapes.hold("songs/a", 0, 100_000, Decoder().decode) as other:
                assert other is not tape
                assert np.array_equal(await read(tape, 0, 100_000), SONG[:100_000])
    tapes.close()
