"""A worker whose device may run out of memory and goes on."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import grpc
import structlog
import torch

from soundstage_device.shortage import is_out_of_memory
from soundstage_runtime.errors import ServiceError, StartError
from soundstage_runtime.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")

_log = structlog.stdlib.get_logger()


class DeviceMemoryError(ServiceError):
    """The device had no memory left for a piece of work."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OUT_OF_MEMORY"


class LoadMemoryError(StartError):
    """There is no memory for what a process loads."""


@contextmanager
def loading(remedies: str) -> Generator[None]:
    """Have out of memory end the start of a process, and name what would do; raises LoadMemoryError."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, DeviceMemoryError) and not is_out_of_memory(error):
            raise
        raise LoadMemoryError(f"there is not enough memory to load and begin: {remedies}") from error


class DeviceWorker(Worker):
    """A Worker that answers for the device: out of memory is an error of the work in hand, not of the process."""

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `work`; see Worker. Raises DeviceMemoryError when it runs out of memory, and keeps nothing of it."""
        return await super().run(_guard, lambda: work(*args, **kwargs))


def _guard(work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        told = str(error).partition("\n")[0] or type(error).__name__
    # Out of the handler: the error has been let go, and with it the tensors of its frames.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _log.warning("device_memory_ran_out", why=told)
    raise DeviceMemoryError(
        "the device has no memory left for this just now; a shorter song or fewer at once need less", retry_after_s=1.0
    )
