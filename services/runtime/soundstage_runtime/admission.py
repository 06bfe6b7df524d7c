"""A bounded number of calls at once: more are refused, never queued without end."""

from collections.abc import Generator
from contextlib import contextmanager

from soundstage_runtime.errors import OverloadedError


class Admission:
    """Counts what is in flight. For use on one event loop."""

    def __init__(self, what: str, *, limit: int, retry_after_s: float = 1.0) -> None:
        self._what = what
        self.retry_after_s = retry_after_s
        self.limit = limit
        self.in_flight = 0

    @contextmanager
    def enter(self, count: int = 1) -> Generator[None]:
        """Hold `count` places until the block ends; raises OverloadedError when they are not free."""
        if self.in_flight + count > self.limit:
            raise OverloadedError(
                f"{self.in_flight} of {self.limit} {self._what} are in flight, no room for {count} more",
                metadata={"limit": str(self.limit), "in_flight": str(self.in_flight)},
                retry_after_s=self.retry_after_s,
            )
        self.in_flight += count
        try:
            yield
        finally:
            self.in_flight -= count
