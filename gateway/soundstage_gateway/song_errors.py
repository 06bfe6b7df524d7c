"""What may be wrong with a song."""

import grpc
import structlog

from soundstage.music.v1.song_service_pb2 import SongError
from soundstage_runtime.errors import ServiceError

_log = structlog.get_logger()


class SongUnknownError(ServiceError):
    """There is no such song, or it is not kept any more."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "SONG_UNKNOWN"


class SongWaitsError(ServiceError):
    """The song is not begun yet, or not again."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "SONG_WAITS"


class VariantUnfinishedError(ServiceError):
    """The variant is not made, or not yet."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "VARIANT_UNFINISHED"


class SongCancelledError(ServiceError):
    """The song was cancelled."""

    code = grpc.StatusCode.CANCELLED
    reason = "SONG_CANCELLED"


class SongFailedError(ServiceError):
    """The song failed a while ago."""

    reason = "SONG_FAILED"


def write_error(error: ServiceError) -> SongError:
    """Write an error down with its song."""
    return SongError(code=int(error.code.value[0]), reason=error.reason, message=error.message)


def first_error(failure: BaseException) -> ServiceError:
    """Return the error that a client is told; what is not meant for one goes to the log."""
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    if isinstance(failure, ServiceError):
        return failure
    _log.error("song_failed", exc_info=failure)
    return ServiceError("an internal error; the server's log has it by the song's name")
