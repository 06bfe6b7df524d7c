"""Errors over HTTP: one table of statuses, and the same facts as the google.rpc details carry."""

import math
from typing import Any, Final

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


class BodyTypeError(ServiceError):
    """The body does not say that it is JSON, as no page from elsewhere can without asking first."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "BODY_TYPE_UNKNOWN"


class RequestSlowError(ServiceError):
    """The request was not whole in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "REQUEST_SLOW"


class RangeError(ServiceError):
    """A range of bytes begins behind the end."""

    code = grpc.StatusCode.OUT_OF_RANGE
    reason = "RANGE_BEYOND_END"


_OWN_STATUSES: Final[dict[type[ServiceError], int]] = {
    MethodUnknownError: 405,
    RequestSlowError: 408,
    BodyTypeError: 415,
}


def write_error(error: ServiceError) -> dict[str, Any]:
    """Write an error as JSON."""
    found: dict[str, Any] = {
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


def respond(error: ServiceError, request_id: str) -> JSONResponse:
    """Answer with an error."""
    status = _OWN_STATUSES.get(type(error), _STATUSES.get(error.code, 500))
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="soundstage"'
    if isinstance(error, MethodUnknownError):
        headers["Allow"] = error.metadata["allowed"]
    if isinstance(error, RangeError):
        headers["Content-Range"] = f"bytes */{error.metadata['size_bytes']}"
    body = write_error(error)
    body["error"]["requestId"] = request_id
    return JSONResponse(body, status, headers)
