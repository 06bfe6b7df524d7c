"""Tapes: decoded audio, kept on disk while there is room."""

import asyncio
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, contextmanager
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
_FAR_FRAMES: Final = 20 * SAMPLE_RATE_HZ

Decode = Callable[[int, int], AsyncGenerator[Samples, None]]
"""Decode frames [start, stop) of a song, as samples [n, 2]."""


class Tape:
    """A song's decoded audio, for those that hold it. Once for all of them it is decoded from where it was left.

    `peak` is the largest absolute sample of the `num_ready` frames that are on disk.
    """

    def __init__(self, path: Path, num_frames: int, decode: Decode) -> None:
        self.num_frames = num_frames
        self.num_ready = 0
        self.peak = 0.0
        self._lows = np.full(-(-num_frames // _BLOCK_FRAMES), np.inf, np.float32)
        self._highs = -self._lows
        self._decode = decode
        self._path = path
        self._path.touch()
        self._file = -1  # open while somebody holds the tape
        self._num_holders = 0
        self._decoding: asyncio.Task[None] | None = None
        self._news = asyncio.Event()

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
                if self._decoding is not None:
                    self._decoding.cancel()
                    self._decoding = None
                os.close(self._file)

    async def read(self, start: int, stop: int) -> AsyncGenerator[Samples, None]:
        """Yield frames [start, stop) as samples [n, 2], at most half a second at once; raises ServiceError."""
        if start > self.num_ready + _FAR_FRAMES:
            # Nobody waits for what lies between: the codec can begin anywhere.
            async with aclosing(self._decode(start, stop)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        while start < stop:
            await self._wait_for(start)
            end = min(stop, self.num_ready, start + FRAMES_PER_CHUNK)
            yield self._load(start, end)
            start = end

    async def find_peak(self) -> float:
        """Return the peak of the whole song, and decode it for that if need be; raises ServiceError."""
        await self._wait_for(self.num_frames - 1)
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

    async def _wait_for(self, frame: int) -> None:
        """Wait until a frame is on disk; raises what the decoding raised."""
        assert self.is_held, "a tape is held by whoever reads it"
        self._decoding = self._decoding or asyncio.create_task(self._go_on())
        while self.num_ready <= frame:
            if self._decoding.done():
                self._decoding.result()
                raise EOFError(f"the decoder ended after {self.num_ready} of {self.num_frames} frames")
            news = asyncio.ensure_future(self._news.wait())
            try:
                await asyncio.wait({news, self._decoding}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                news.cancel()

    async def _go_on(self) -> None:
        detach()  # it goes on for all readers, whatever the first one's deadline
        async with aclosing(self._decode(self.num_ready, self.num_frames)) as pieces:
            async for piece in pieces:
                self._store(piece)
                self._draw(piece)
                self.num_ready += len(piece)
                self._news.set()
                self._news = asyncio.Event()

    def _draw(self, piece: Samples) -> None:
        """Take the next samples into the overview and the peak."""
        first, last = self.num_ready // _BLOCK_FRAMES, (self.num_ready + len(piece) - 1) // _BLOCK_FRAMES
        starts = CHANNELS * np.maximum(np.arange(first, last + 1) * _BLOCK_FRAMES - self.num_ready, 0)
        samples = piece.ravel()  # one long row is several times as fast as a minimum along an axis of two
        lows, highs = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
        blocks = slice(first, last + 1)
        self._lows[blocks] = np.minimum(self._lows[blocks], lows)
        self._highs[blocks] = np.maximum(self._highs[blocks], highs)
        self.peak = max(self.peak, float(-lows.min()), float(highs.max()))

    def _store(self, piece: Samples) -> None:
        """Write the next samples; raises DiskFullError."""
        data, place = memoryview(piece.tobytes()), self.num_ready * _FRAME_BYTES
        with tell_full_disk("decoded audio"):
            while data:
                written = os.pwrite(self._file, data, place)
                data, place = data[written:], place + written

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
