"""Errors over HTTP: one table of statuses, and the same facts as the google.rpc details carry."""

import math
from typing import Final

import grpc
from starlette.responses import JSONResponse

from soundstage_runtime.errors import ServiceError

_STATUSES: Final = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.CANCELLED: 410,  # a song that was cancelled, and will not come
    grpc.StatusCode.OUT_OF_RANGE: 416,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


class RouteUnknownError(ServiceError):
    """There is nothing at this path."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "ROUTE_UNKNOWN"


class MethodUnknownError(ServiceError):
    """The path takes other methods."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "METHOD_UNKNOWN"


class RangeError(ServiceError):
    """A range of bytes begins behind the end."""

    code = grpc.StatusCode.OUT_OF_RANGE
    reason = "RANGE_BEYOND_END"


def write_error(error: ServiceError) -> dict[str, object]:
    """Write an error as JSON."""
    found: dict[str, object] = {
        "code": error.code.value[0],
        "status": error.code.name,
        "message": error.message,
        "reason": error.reason,
    }
    if error.violations:
        found["violations"] = [{"field": v.field, "description": v.description} for v in error.violations]
    if error.retry_after_s is not None:
        found["retryAfterS"] = error.retry_after_s
    return {"error": found}


def respond(error: ServiceError) -> JSONResponse:
    """Answer with an error."""
    status = 405 if isinstance(error, MethodUnknownError) else _STATUSES.get(error.code, 500)
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="soundstage"'
    if isinstance(error, MethodUnknownError):
        headers["Allow"] = error.metadata["allowed"]
    if isinstance(error, RangeError):
        headers["Content-Range"] = f"bytes */{error.metadata['size_bytes']}"
    return JSONResponse(write_error(error), status, headers)
