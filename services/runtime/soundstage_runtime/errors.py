"""Errors a client may see: each has a gRPC status, a reason, and google.rpc details. The only place that maps them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from soundstage_runtime.call import current_id

DOMAIN = "soundstage"
_DETAILS_KEY = "grpc-status-details-bin"
# Clients refuse an answer with more than 8 KiB of metadata, where bytes take four thirds of their size, or three times.
_MAX_MESSAGE_BYTES: Final = 500
_MAX_VALUE_BYTES: Final = 300
_MAX_VIOLATIONS_BYTES: Final = 3000


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One bad field: its path in the request, and what it held and what was wanted."""

    field: str
    description: str


class StartError(Exception):
    """A process cannot start; the message says why and what would do."""


class ServiceError(Exception):
    """An error with a status; `reason` is a constant a program can compare, `message` is for people."""

    code = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


class InvalidRequestError(ServiceError):
    """The request is wrong, whatever the state of the service; all bad fields are named at once."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        text = "; ".join(f"{v.field} {v.description}" for v in violations)
        super().__init__(text, violations=violations)


class OverloadedError(ServiceError):
    """A bounded queue is full."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"


class ModelMismatchError(ServiceError):
    """The call was meant for another model than the one that is loaded."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_MISMATCH"


class StageUnavailableError(ServiceError):
    """A stage cannot be reached, or went away in the middle of a call."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "STAGE_UNAVAILABLE"


class StageError(ServiceError):
    """A stage refused or failed a call; it keeps the stage's own status."""

    reason = "STAGE_FAILED"


def check_fingerprint(wanted: str, loaded: str) -> None:
    """Raise ModelMismatchError unless `wanted` is empty or the loaded model's fingerprint."""
    if wanted not in ("", loaded):
        raise ModelMismatchError(
            f"model_fingerprint is {wanted}, but {loaded} is loaded; ask StageService.Describe what is served",
            metadata={"wanted": wanted, "loaded": loaded},
        )


def to_status(error: ServiceError) -> Status:
    """Write an error as google.rpc.Status: ErrorInfo always, BadRequest and RetryInfo where they apply.

    ErrorInfo has the current call's id, by which the log has it too. What is long is cut, and says so.
    """
    told = error.metadata | ({"request_id": request_id} if (request_id := current_id()) else {})
    metadata = {key: _cut(value, _MAX_VALUE_BYTES) for key, value in told.items()}
    details: list[ErrorInfo | BadRequest | RetryInfo] = [
        ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    ]
    if error.violations:
        details.append(_write_violations(error.violations))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=error.code.value[0], message=_cut(error.message, _MAX_MESSAGE_BYTES))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _write_violations(violations: Sequence[Violation]) -> BadRequest:
    """Write the first violations, and behind them how many more there are."""
    bad = BadRequest()
    for index, violation in enumerate(violations):
        field, description = (_cut(text, _MAX_VALUE_BYTES) for text in (violation.field, violation.description))
        if bad.ByteSize() > _MAX_VIOLATIONS_BYTES:
            bad.field_violations.add(field=field, description=f"is one of {len(violations) - index} more that are bad")
            break
        bad.field_violations.add(field=field, description=description)
    return bad


def _cut(text: str, max_bytes: int) -> str:
    kept = text.encode()[:max_bytes].decode(errors="ignore")
    return text if kept == text else f"{kept}… and {len(text) - len(kept)} more characters"


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: ServiceError) -> NoReturn:
    """End a call with the error's status and details."""
    status = to_status(error)
    details = ((_DETAILS_KEY, status.SerializeToString()),)
    await context.abort(error.code, status.message, trailing_metadata=details)


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """The google.rpc details that came with a failed call; empty where the server sent none."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    violations: tuple[Violation, ...] = ()
    retry_after_s: float | None = None


def read_details(error: grpc.aio.AioRpcError) -> Details:
    """Read the details of a failed call."""
    status = Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            status.ParseFromString(value)
    details = Details()
    for packed in status.details:
        bad, retry, info = BadRequest(), RetryInfo(), ErrorInfo()
        if packed.Unpack(bad):
            found = tuple(Violation(field=v.field, description=v.description) for v in bad.field_violations)
            details = replace(details, violations=found)
        elif packed.Unpack(retry):
            details = replace(details, retry_after_s=retry.retry_delay.ToMilliseconds() / 1000)
        elif packed.Unpack(info):
            details = replace(details, reason=info.reason, metadata=dict(info.metadata))
    return details


def from_rpc(stage: str, error: grpc.aio.AioRpcError) -> ServiceError:
    """Read what a stage answered as an error of our own, so that a caller learns which stage it was and why."""
    details = read_details(error)
    message = f"the {stage} stage: {error.details() or error.code().name}"
    metadata = {**details.metadata, "stage": stage, "stage_reason": details.reason}
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return StageUnavailableError(message, metadata=metadata, retry_after_s=details.retry_after_s or 1.0)
    wrapped = StageError(message, metadata=metadata, violations=details.violations, retry_after_s=details.retry_after_s)
    wrapped.code = error.code()
    return wrapped
