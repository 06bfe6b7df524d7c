"""The disk: what is told when it is full."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

import grpc

from soundstage_runtime.errors import ServiceError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(ServiceError):
    """There is no room left on disk."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "DISK_FULL"


@contextmanager
def tell_full_disk(what: str) -> Generator[None, None, None]:
    """Raise DiskFullError where writing `what` ends for want of room."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(f"the disk has no room left for {what}", retry_after_s=60.0) from error
