"""How long a tile memory has room for, and what is tried when it runs out."""

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

import structlog

from soundstage_device.shortage import is_out_of_memory
from soundstage_device.worker import DeviceMemoryError

WINDOWS: Final = (64, 128, 256, 512, 1024, 1536)
_SHARE: Final = 0.5  # of free memory that a batch may be planned to take: the allocator and others need some

_log = structlog.stdlib.get_logger()
T = TypeVar("T")


def choose_window(free_bytes: int, bytes_of: Callable[[int], int]) -> int:
    """Choose the longest window of WINDOWS whose bytes fit well in free memory; the shortest if none does."""
    fitting = [window for window in WINDOWS if bytes_of(window) <= free_bytes * _SHARE]
    return max(fitting, default=WINDOWS[0])


def first_that_fits(attempts: Iterable[tuple[str, Callable[[], T]]], *, relieve: Callable[[], None], what: str) -> T:
    """Return what the first attempt gives that does not run out of memory; raises DeviceMemoryError.

    After each that does, `relieve` frees what it can.
    """
    for name, attempt in attempts:
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler: the error has been let go, and with it the tensors of the attempt.
        relieve()
        _log.warning("memory_ran_out", what=what, tried=name)
    raise DeviceMemoryError(
        f"{what} does not fit in memory, whatever was tried; a smaller window_frames of the codec would do"
    )
