"""Whose tile the device computes next: that of the listener who would run dry first."""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Window = NDArray[np.float32]  # [frames, channels]
Order = Literal["earliest-dry", "first-come"]
R = TypeVar("R")


class Device(Protocol):
    """Does one piece of work after another, as soundstage_runtime's Worker."""

    def run(self, work: Callable[[], R], /) -> Awaitable[R]:
        """Await `work`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Work(Generic[R]):
    """What is done to windows of one shape: one outcome each, in their order.

    `batches` says how many windows of a length, in frames, it may have at once; of any other it has one.
    """

    run: Callable[[Sequence[Window]], Sequence[R | Exception]]
    batches: Mapping[int, int] = field(default_factory=dict[int, int])


class Stream:
    """One caller's stream, and when who plays it at the rate of time would run dry."""

    def __init__(self, now_s: float) -> None:
        """Begin dry."""
        self.dry_s = now_s

    def hand_on(self, audio_s: float, now_s: float) -> None:
        """Count audio that the caller is given. Who had run dry has stood still since, and plays on from now."""
        self.dry_s = max(self.dry_s, now_s) + audio_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tile:
    stream: Stream
    work: Work[Any]
    window: Window
    outcome: "asyncio.Future[Any]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class TileScheduler:
    """Has a device compute the tiles that streams ask for, one batch after another. For use on one event loop.

    A stream asks for its next tile when its caller has taken what the last one gave: who reads slowly holds up nobody,
    and no stream has more than one tile here. A tile keeps its place while it waits, and a stream that went before it
    comes back with a later one: once its listener is dry, it waits for at most one tile of every other stream.
    """

    def __init__(
        self, device: Device, *, order: Order = "earliest-dry", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device, self._order, self._clock = device, order, clock
        self._waiting: list[_Tile] = []
        self._rounds: asyncio.Task[None] | None = None
        self.num_dropped = 0

    @property
    def num_waiting(self) -> int:
        """How many tiles wait for the device."""
        return len(self._waiting)

    def open(self) -> Stream:
        """Open a stream now."""
        return Stream(self._clock())

    def hand_on(self, stream: Stream, audio_s: float) -> None:
        """Count audio that a stream's caller is given now; with none of it, the stream goes behind all that are dry."""
        stream.hand_on(audio_s, self._clock())

    async def run(self, stream: Stream, work: Work[R], window: Window) -> R:
        """Await the outcome of a stream's next tile, and raise it if it is an error.

        When the awaiting task is cancelled, a tile that has not begun is dropped.
        """
        tile = _Tile(stream=stream, work=work, window=window)
        self._waiting.append(tile)
        if self._rounds is None:
            # In a context of its own: the rounds belong to no single call.
            self._rounds = asyncio.create_task(self._run_rounds(), context=contextvars.Context())
        try:
            return await tile.outcome
        except asyncio.CancelledError:
            if tile in self._waiting:
                self._waiting.remove(tile)
                self.num_dropped += 1
            raise

    async def _run_rounds(self) -> None:
        try:
            while self._waiting:
                await self._run_round(self._take())
        finally:
            self._rounds = None

    def _take(self) -> Sequence[_Tile]:
        """Take the first tile in order out of the queue, with others that can be computed beside it."""
        tiles = self._waiting if self._order == "first-come" else sorted(self._waiting, key=lambda t: t.stream.dry_s)
        first = tiles[0]
        alike = [tile for tile in tiles if tile.work is first.work and tile.window.shape == first.window.shape]
        batch = alike[: first.work.batches.get(len(first.window), 1)]
        self._waiting = [tile for tile in self._waiting if tile not in batch]
        return batch

    async def _run_round(self, batch: Sequence[_Tile]) -> None:
        windows = [tile.window for tile in batch]
        outcomes: Sequence[object]
        try:
            outcomes = await self._device.run(lambda: batch[0].work.run(windows))
        except Exception as error:
            outcomes = [error] * len(batch)
        for tile, outcome in zip(batch, outcomes, strict=True):
            if tile.outcome.done():  # its stream was cancelled
                continue
            if isinstance(outcome, Exception):
                tile.outcome.set_exception(outcome)
            else:
                tile.outcome.set_result(outcome)
