"""A bounded number of calls at once, and a bounded queue before it: the rest are refused at once."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from soundstage_runtime.errors import OverloadedError


class Admission:
    """Counts what is in flight and lets up to `max_waiting` wait their turn, first come first served.

    For use on one event loop.
    """

    def __init__(self, what: str, *, limit: int, max_waiting: int = 0, retry_after_s: float = 1.0) -> None:
        self.what = what
        self._max_waiting = max_waiting
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()
        self.retry_after_s = retry_after_s
        self.limit = limit
        self.in_flight = 0
        self.num_refused = 0

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._queue)

    @asynccontextmanager
    async def enter(self, count: int = 1) -> AsyncGenerator[None, None]:
        """Hold `count` places until the block ends; raises OverloadedError when the queue is full too."""
        await self._take(count)
        try:
            yield
        finally:
            self._give_back(count)

    async def _take(self, count: int) -> None:
        if not self._queue and self.in_flight + count <= self.limit:
            self.in_flight += count
            return
        if self.waiting >= self._max_waiting:
            self.num_refused += 1
            raise OverloadedError(
                f"{self.in_flight} of {self.limit} {self.what} are in flight and {self.waiting} wait, "
                f"no room for {count} more",
                metadata={"limit": str(self.limit), "in_flight": str(self.in_flight), "waiting": str(self.waiting)},
                retry_after_s=self.retry_after_s,
            )
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((turn, count))
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the place came before the cancellation
                self._give_back(count)
            elif (turn, count) in self._queue:  # else it was passed over already
                self._queue.remove((turn, count))
                self._call_next()
            raise

    def _give_back(self, count: int) -> None:
        self.in_flight -= count
        self._call_next()

    def _call_next(self) -> None:
        while self._queue and self.in_flight + self._queue[0][1] <= self.limit:
            turn, count = self._queue.popleft()
            if not turn.cancelled():
                self.in_flight += count
                turn.set_result(None)
