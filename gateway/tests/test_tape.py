"""Tapes: what is decoded is decoded once, and read in any range while it grows."""

import asyncio
import random
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
        self.num_given = 0
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
                self.num_given += end - start
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
        assert decoder.asked == [(2_976_000, 3_072_000)]  # the whole seconds that hold it


async def test_a_listener_far_ahead_who_takes_its_time_does_not_hold_the_codec(tmp_path: Path) -> None:
    decoder = Decoder()
    first, half_minute = 1_440_000, 1_440_000
    with open_tape(tmp_path, decoder.decode) as tape:
        async with aclosing(tape.read(first + 5, len(SONG))) as pieces:
            found = [await anext(pieces)]
            await asyncio.wait_for(decoder.closed.wait(), 5)  # the range is decoded, though only its beginning is taken
            assert np.array_equal(await read(tape, first + 300_000, first + 400_000), SONG[1_740_000:1_840_000])
            assert decoder.asked == [(first, first + half_minute)]
            while sum(map(len, found)) < half_minute - 9 * 48_000:  # ten seconds before its end the next is begun
                found.append(await anext(pieces))
            await asyncio.sleep(0)
            assert decoder.asked[1:] == [(first + half_minute, len(SONG))]
            found += [piece async for piece in pieces]
    assert np.array_equal(np.concatenate(found), SONG[first + 5 :])


async def test_what_was_decoded_far_ahead_is_not_decoded_again(tmp_path: Path) -> None:
    decoder = Decoder()
    with open_tape(tmp_path, decoder.decode) as tape:
        await read(tape, 2_000_000, 2_500_000)
        assert not tape.is_whole
        peak = await tape.find_peak()
        assert np.array_equal(await read(tape, 0, len(SONG)), SONG)
        assert tape.is_whole
    assert peak == np.abs(SONG).max()
    assert sum(stop - start for start, stop in decoder.asked) == len(SONG)


async def test_many_readers_anywhere_at_any_speed_get_the_song_that_is_decoded_once(tmp_path: Path) -> None:
    chance = random.Random(0)
    decoder = Decoder()

    async def listen(tape: Tape, start: int, stop: int, *, patience: int, leaves_at: int) -> bool:
        place, is_right = start, True
        for _ in range(chance.randrange(400)):
            await asyncio.sleep(0)
        async with aclosing(tape.read(start, stop)) as pieces:
            async for piece in pieces:
                is_right = is_right and np.array_equal(piece, SONG[place : place + len(piece)])
                place += len(piece)
                if place >= leaves_at:
                    break
                for _ in range(patience):
                    await asyncio.sleep(0)
        return is_right and place >= leaves_at

    async def listen_together(tape: Tape, *, some_leave: bool) -> list[bool]:
        spans = [sorted(chance.sample(range(len(SONG)), 2)) for _ in range(30)]
        ends = [(start + stop) // 2 if some_leave else stop for start, stop in spans]
        return await asyncio.gather(
            *(
                listen(tape, start, stop, patience=chance.choice([0, 1, 20]), leaves_at=leaves_at)
                for (start, stop), leaves_at in zip(spans, ends, strict=True)
            )
        )

    for _ in range(5):
        decoder.num_given = 0
        tape = Tape(tmp_path / "tape", len(SONG), decoder.decode)
        with tape.hold():
            assert all(await listen_together(tape, some_leave=True))
        with tape.hold():
            assert all(await listen_together(tape, some_leave=False))
            await tape.find_peak()
        tape.remove()
        assert decoder.num_given < 1.1 * len(SONG)  # where one decoding meets another, a piece may be of both


async def test_a_listener_hears_nothing_of_a_codec_that_was_away_for_a_while(tmp_path: Path) -> None:
    failed = asyncio.Event()

    async def decode(start: int, stop: int) -> AsyncGenerator[Samples, None]:
        async with aclosing(Decoder().decode(start, stop)) as pieces:
            async for piece in pieces:
                start += len(piece)
                if start > 150_000 and not failed.is_set():
                    failed.set()
                    raise ConnectionError("away")
                yield piece

    with open_tape(tmp_path, decode, 300_000) as tape:
        async with aclosing(tape.read(0, 300_000)) as slow:
            heard = [await anext(slow)]
            await failed.wait()
            for _ in range(9):  # nobody waits while the error makes its way
                await asyncio.sleep(0)
            heard += [piece async for piece in slow]
        assert np.array_equal(np.concatenate(heard), SONG[:300_000])


async def test_an_error_is_told_to_those_who_wait_and_then_forgotten(tmp_path: Path) -> None:
    decoder = Decoder()
    is_away = False

    async def decode(start: int, stop: int) -> AsyncGenerator[Samples, None]:
        async with aclosing(decoder.decode(start, stop)) as pieces:
            async for piece in pieces:
                if is_away:
                    raise ConnectionError("away")
                yield piece

    with open_tape(tmp_path, decode, 300_000) as tape:
        async with aclosing(tape.read(0, 300_000)) as slow:
            heard = [await anext(slow)]
            is_away = True
            for _ in range(2):
                with pytest.raises(ConnectionError):
                    await read(tape, 200_000, 300_000)
            is_away = False
            assert np.array_equal(await read(tape, 200_000, 300_000), SONG[200_000:300_000])
            heard += [piece async for piece in slow]
        assert np.array_equal(np.concatenate(heard), SONG[:300_000])


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
