"""Tapes: decoded audio, kept on disk while there is room."""

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import numpy as np

from soundstage_gateway.audio_file import Samples
from soundstage_gateway.disk import tell_full_disk
from soundstage_runtime.call import detach
from soundstage_runtime.pcm import FRAMES_PER_CHUNK
from soundstage_runtime.score import CHANNELS, SAMPLE_RATE_HZ

_FRAME_BYTES: Final = CHANNELS * 4
_BLOCK_FRAMES: Final = 200
_SECTION_FRAMES: Final = 2 * SAMPLE_RATE_HZ
_RANGE_FRAMES: Final = 15 * _SECTION_FRAMES
_FAR_FRAMES: Final = 20 * SAMPLE_RATE_HZ
_AHEAD_FRAMES: Final = 10 * SAMPLE_RATE_HZ

Decode = Callable[[int, int], AsyncGenerator[Samples, None]]
"""Decode frames [start, stop) of a song, as samples [n, 2]."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Run:
    """A decoding from `start` to `stop`; `place` is the next frame that it writes."""

    start: int
    place: int
    stop: int
    task: asyncio.Task[None] = field(init=False)


class Tape:
    """A song's decoded audio, for those that hold it. Once for all of them it is decoded from where it was left.

    For who begins far ahead it is decoded there, in ranges that are begun as a reader comes near, so that the codec is
    not held while they play. It is kept in sections, each filled from its beginning. `peak` is the largest absolute
    sample that is on disk.
    """

    def __init__(self, path: Path, num_frames: int, decode: Decode) -> None:
        self.num_frames = num_frames
        self.peak = 0.0
        self._filled = [0] * -(-num_frames // _SECTION_FRAMES)
        self._num_whole = 0  # sections that are whole, before the first that is not
        self._lows = np.full(-(-num_frames // _BLOCK_FRAMES), np.inf, np.float32)
        self._highs = -self._lows
        self._decode = decode
        self._path = path
        self._path.touch()
        self._file = -1  # open while somebody holds the tape
        self._num_holders = 0
        self._runs: list[_Run] = []
        self._news = asyncio.Event()

    @property
    def num_ready(self) -> int:
        """How many frames are on disk, from the beginning on without a gap."""
        return self._end_of(self._num_whole * _SECTION_FRAMES)

    @property
    def is_whole(self) -> bool:
        """Whether all of it is on disk."""
        return self.num_ready == self.num_frames

    @property
    def is_held(self) -> bool:
        """Whether anybody may read it now."""
        return self._num_holders > 0

    @contextmanager
    def hold(self) -> Generator[Self, None, None]:
        """Let it be read; the last to let go stops the decoding."""
        if not self._num_holders:
            self._file = os.open(self._path, os.O_RDWR)
        self._num_holders += 1
        try:
            yield self
        finally:
            self._num_holders -= 1
            if not self._num_holders:
                for run in self._runs:
                    run.task.cancel()
                self._runs.clear()
                os.close(self._file)

    async def read(self, start: int, stop: int) -> AsyncGenerator[Samples, None]:
        """Yield frames [start, stop) as samples [n, 2], at most half a second at once; raises ServiceError."""
        while start < stop:
            await self._wait_for(start, stop)
            self._look_ahead(start, stop)
            end = min(stop, self._end_of(start), start + FRAMES_PER_CHUNK)
            yield self._load(start, end)
            start = end

    async def find_peak(self) -> float:
        """Return the peak of the whole song, and decode it for that if need be; raises ServiceError."""
        while not self.is_whole:
            await self._wait_for(self.num_ready, self.num_frames)
        return self.peak

    def overview(self, num_bins: int) -> Samples:
        """Return the lowest and highest sample [bins, 2] of what is on disk; the song has `num_bins` bins.

        Their edges are rounded to blocks of 4 ms, as nobody sees them, so that nothing need be read.
        """
        edges = np.linspace(0, self.num_frames, num_bins + 1).astype(int)
        ends = edges[1:][edges[1:] <= self.num_ready]
        if not len(ends):
            return np.empty((0, 2), np.float32)
        starts, stop = edges[: len(ends)] // _BLOCK_FRAMES, -(-ends[-1] // _BLOCK_FRAMES)
        lows, highs = self._lows[:stop], self._highs[:stop]
        return np.stack([np.minimum.reduceat(lows, starts), np.maximum.reduceat(highs, starts)], axis=1)

    def remove(self) -> None:
        """Forget it; those that hold it read on."""
        self._path.unlink()

    async def _wait_for(self, frame: int, stop: int) -> None:
        """Wait until a frame is on disk, for a reader who reads up to `stop`; raises what the decoding raised."""
        assert self.is_held, "a tape is held by whoever reads it"
        while self._end_of(frame) == frame:
            run = self._find_run(frame) or self._begin(frame, stop)
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait({news, run.task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()
            if run.task.done() and self._end_of(frame) == frame:
                self._forget(run)
                run.task.result()

    def _look_ahead(self, frame: int, stop: int) -> None:
        """Have decoded what a reader comes to soon, so that it need not wait for it."""
        end = self._end_of(frame)
        if end < min(frame + _AHEAD_FRAMES, stop) and not self._find_run(end):
            self._begin(end, stop)

    def _end_of(self, frame: int) -> int:
        """Return the end of what is on disk without a gap from a frame on; the frame itself where it is not."""
        section = frame // _SECTION_FRAMES
        end = frame
        while section < len(self._filled):
            end = max(frame, section * _SECTION_FRAMES + self._filled[section])
            section += 1
            if end < section * _SECTION_FRAMES:
                break
        return end

    def _find_run(self, frame: int) -> _Run | None:
        """Find the decoding that will have come to a frame soon."""
        runs = (run for run in self._runs if run.place <= frame < run.stop and frame <= run.place + _FAR_FRAMES)
        return next(runs, None)

    def _begin(self, frame: int, stop: int) -> _Run:
        """Begin to decode for who waits for a frame: all that is missing, or, far ahead, no more than a range."""
        place, end = self.num_ready, self.num_frames
        while run := next((run for run in self._runs if run.place <= place < run.stop), None):
            place = self._end_of(run.stop)
        if place > frame or frame > self.num_ready + _FAR_FRAMES:
            section = frame // _SECTION_FRAMES
            place = section * _SECTION_FRAMES + self._filled[section]
            end = min(-(-stop // _SECTION_FRAMES) * _SECTION_FRAMES, section * _SECTION_FRAMES + _RANGE_FRAMES)
        end = min([end, self._next_whole(place), *(run.place for run in self._runs if run.place > place)])
        for run in self._runs:
            if run.place < place:
                run.stop = min(run.stop, place)  # no two of them decode the same
        run = _Run(start=place, place=place, stop=end)
        run.task = asyncio.create_task(self._go_on(run))
        run.task.add_done_callback(lambda task: self._end(run, task))
        self._runs.append(run)
        return run

    def _end(self, run: _Run, task: asyncio.Task[None]) -> None:
        """Forget a run that has ended: what it has not done is begun anew by whoever comes there.

        One that failed at once is told to them first, so that a codec that does nothing is not asked for ever.
        """
        has_failed = not task.cancelled() and task.exception() is not None
        if not has_failed or run.place >= run.start + _SECTION_FRAMES:
            self._forget(run)

    def _forget(self, run: _Run) -> None:
        if run in self._runs:
            self._runs.remove(run)

    async def _go_on(self, run: _Run) -> None:
        detach()  # it goes on for all readers, whatever the first one's deadline
        stop = run.stop
        async with aclosing(self._decode(run.place, stop)) as pieces:
            async for piece in pieces:
                self._store(run.place, piece)
                run.place += len(piece)
                if run.stop <= run.place and run.stop < stop:  # another run has what follows
                    return
        if run.place < stop:
            raise EOFError(f"the decoder ended after {run.place} of {self.num_frames} frames")

    def _next_whole(self, frame: int) -> int:
        """Return where the next section begins that is whole, or the end."""
        for section in range(frame // _SECTION_FRAMES + 1, len(self._filled)):
            if self._filled[section] == _SECTION_FRAMES:
                return section * _SECTION_FRAMES
        return self.num_frames

    def _store(self, place: int, piece: Samples) -> None:
        """Take in samples from a frame on, which follows what its section has; raises DiskFullError."""
        self._write(place, piece)
        self._draw(place, piece)
        end = place + len(piece)
        for section in range(place // _SECTION_FRAMES, -(-end // _SECTION_FRAMES)):
            filled = min(end - section * _SECTION_FRAMES, _SECTION_FRAMES)
            self._filled[section] = max(self._filled[section], filled)
        while self._num_whole < len(self._filled) and self._filled[self._num_whole] == _SECTION_FRAMES:
            self._num_whole += 1
        self._news.set()
        self._news = asyncio.Event()

    def _draw(self, place: int, piece: Samples) -> None:
        """Take samples into the overview and the peak."""
        first, last = place // _BLOCK_FRAMES, (place + len(piece) - 1) // _BLOCK_FRAMES
        starts = CHANNELS * np.maximum(np.arange(first, last + 1) * _BLOCK_FRAMES - place, 0)
        samples = piece.ravel()  # one long row is several times as fast as a minimum along an axis of two
        lows, highs = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
        blocks = slice(first, last + 1)
        self._lows[blocks] = np.minimum(self._lows[blocks], lows)
        self._highs[blocks] = np.maximum(self._highs[blocks], highs)
        self.peak = max(self.peak, float(-lows.min()), float(highs.max()))

    def _write(self, place: int, piece: Samples) -> None:
        """Write samples; raises DiskFullError."""
        data, offset = memoryview(piece.tobytes()), place * _FRAME_BYTES
        with tell_full_disk("decoded audio"):
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written

    def _load(self, start: int, end: int) -> Samples:
        data = os.pread(self._file, (end - start) * _FRAME_BYTES, start * _FRAME_BYTES)
        return np.frombuffer(data, np.float32).reshape(-1, CHANNELS)


class Tapes:
    """Tapes by song and variant, at most `limit_bytes` beyond those that are held; the least used go first."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._tapes: OrderedDict[tuple[str, int], Tape] = OrderedDict()

    @contextmanager
    def hold(self, song: str, variant: int, num_frames: int, decode: Decode) -> Generator[Tape, None, None]:
        """Hold a variant's tape, a new one if there is none."""
        key = (song, variant)
        if key not in self._tapes:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{song.rpartition('/')[2]}-{variant}.f32"
            self._tapes[key] = Tape(path, num_frames, decode)
        self._tapes.move_to_end(key)
        try:
            with self._tapes[key].hold() as tape:
                self._make_room()
                yield tape
        finally:
            self._make_room()

    def remove(self, song: str) -> None:
        """Forget a song's tapes; those that hold one read on."""
        for key in [key for key in self._tapes if key[0] == song]:
            self._tapes.pop(key).remove()

    def close(self) -> None:
        """Forget all tapes."""
        while self._tapes:
            self._tapes.popitem()[1].remove()

    def _make_room(self) -> None:
        size_bytes = sum(tape.num_frames for tape in self._tapes.values()) * _FRAME_BYTES
        for key in [key for key, tape in self._tapes.items() if not tape.is_held]:
            if size_bytes <= self._limit_bytes:
                break
            tape = self._tapes.pop(key)
            size_bytes -= tape.num_frames * _FRAME_BYTES
            tape.remove()
