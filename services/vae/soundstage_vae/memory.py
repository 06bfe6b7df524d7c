"""What tiles take of a device's memory, and what is tried when it runs out."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import grpc
import structlog
import torch

from soundstage_runtime.errors import ServiceError

WINDOWS: Final = (64, 128, 256, 512, 1024, 1536)
# Of the widest layer's output, held at once: measured as 5.2 MB a frame at the released widths in float32.
_LIVE_TENSORS: Final = 5.3
_SHARE: Final = 0.5  # of free memory that a batch may be planned to take: the allocator and others need some

_log = structlog.stdlib.get_logger()
T = TypeVar("T")


class MemoryExhaustedError(ServiceError):
    """A tile fits nowhere."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OUT_OF_MEMORY"


def frame_bytes(*, channels: int, multiples: Sequence[int], strides: Sequence[int], value_bytes: int) -> int:
    """Estimate what a latent frame takes on its way through a decoder, whose first strides are the deepest layers'.

    A layer is `channels` times one of `multiples` wide, the deepest the widest.
    """
    widths = [channels * multiple for multiple in (1, *multiples)][::-1]
    rates = [math.prod(strides[:depth]) for depth in range(len(strides) + 1)]
    widest = max(width * rate for width, rate in zip(widths, rates, strict=True))
    return round(widest * value_bytes * _LIVE_TENSORS)


def choose_window(free_bytes: int, bytes_per_frame: int) -> int:
    """Choose the longest window of WINDOWS that fits well in free memory; the shortest if none does."""
    fitting = [window for window in WINDOWS if window * bytes_per_frame <= free_bytes * _SHARE]
    return max(fitting, default=WINDOWS[0])


def first_that_fits(attempts: Iterable[tuple[str, Callable[[], T]]], *, relieve: Callable[[], None], what: str) -> T:
    """Return what the first attempt gives that does not run out of memory; raises MemoryExhaustedError.

    After each that does, `relieve` frees what it can.
    """
    for name, attempt in attempts:
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Out of the handler: the error has been let go, and with it the tensors of the attempt.
        relieve()
        _log.warning("memory_ran_out", what=what, tried=name)
    raise MemoryExhaustedError(
        f"{what} does not fit in memory, whatever was tried; a smaller window_frames of the codec would do"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is a device's or the host's that has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
