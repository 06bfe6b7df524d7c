from base64 import b64encode
from typing import Any
from urllib.parse import quote

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from soundstage.stage.v1.stage_service_pb2 import DescribeRequest, DescribeResponse
from soundstage.stage.v1.stage_service_pb2_grpc import (
    StageServiceServicer,
    StageServiceStub,
    add_StageServiceServicer_to_server,
)
from soundstage_runtime.call import REQUEST_ID_KEY
from soundstage_runtime.errors import (
    InvalidRequestError,
    ModelMismatchError,
    OverloadedError,
    ServiceError,
    StageError,
    StageUnavailableError,
    Violation,
    check_fingerprint,
    from_rpc,
    read_details,
    to_status,
)
from soundstage_runtime.serve import Server, Service

NAME = "soundstage.stage.v1.StageService"
INVALID = InvalidRequestError(
    [Violation(field="seed", description="is -1; must be 0 or more"), Violation(field="bpm", description="is 7")]
)
OVERLOADED = OverloadedError("full", metadata={"limit": "4"}, retry_after_s=1.25)


class Failing(StageServiceServicer):
    """Fails every call with one error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def Describe(
        self, request: DescribeRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> DescribeResponse:
        raise self._error


async def answer(error: Exception, *, request_id: str = "") -> grpc.aio.AioRpcError:
    """The error as a client gets it."""
    metadata = ((REQUEST_ID_KEY, request_id),) if request_id else ()
    service = Service(name=NAME, add=lambda server: add_StageServiceServicer_to_server(Failing(error), server))
    async with Server([service]) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await StageServiceStub(channel).Describe(DescribeRequest(), metadata=metadata)
    return caught.value


def test_a_status_always_says_reason_and_domain() -> None:
    info = ErrorInfo()
    assert to_status(ServiceError("x", metadata={"a": "b"})).details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == ("INTERNAL", "soundstage", {"a": "b"})


def test_a_status_lists_all_bad_fields() -> None:
    status = to_status(INVALID)
    bad = BadRequest()
    assert status.details[1].Unpack(bad)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("seed", "is -1; must be 0 or more"),
        ("bpm", "is 7"),
    ]
    assert status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert status.message == "seed is -1; must be 0 or more; bpm is 7"


def test_a_status_says_when_to_come_back() -> None:
    retry = RetryInfo()
    assert to_status(OVERLOADED).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1250


async def test_details_survive_the_wire() -> None:
    invalid, overloaded = read_details(await answer(INVALID)), read_details(await answer(OVERLOADED))
    assert invalid.reason == "INVALID_REQUEST"
    assert invalid.violations == INVALID.violations
    assert overloaded.metadata["limit"] == "4"
    assert overloaded.retry_after_s == 1.25


async def test_an_error_tells_the_id_of_its_call_given_or_drawn() -> None:
    given = await answer(RuntimeError("broken"), request_id="mine")
    drawn = [read_details(await answer(OVERLOADED)).metadata["request_id"] for _ in range(2)]
    assert read_details(given).metadata == {"request_id": "mine"}
    assert [len(request_id) for request_id in drawn] == [32, 32]
    assert len(set(drawn)) == 2


async def test_many_and_long_violations_reach_a_client_cut_to_what_metadata_may_take() -> None:
    violations = [Violation(field=f"adapters[{n}].name", description="is " + "🎵" * 5_000) for n in range(1_000)]
    error = await answer(InvalidRequestError(violations))
    found = read_details(error).violations
    [sent] = [value for _, value in error.trailing_metadata() or () if isinstance(value, bytes)]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(quote(error.details() or "")) + len(b64encode(sent)) < 8 << 10
    assert [violation.field for violation in found] == [violation.field for violation in violations[: len(found)]]
    assert found[0].description == "is " + "🎵" * 74 + "… and 4926 more characters"
    assert found[-1].description == f"is one of {1_001 - len(found)} more that are bad"


async def test_a_stages_refusal_keeps_its_status_and_says_whose_it_was() -> None:
    error = from_rpc("dit", await answer(INVALID))
    assert isinstance(error, StageError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations == INVALID.violations
    assert error.message.startswith("the dit stage: seed is -1")
    assert error.metadata["stage"] == "dit"
    assert error.metadata["stage_reason"] == "INVALID_REQUEST"


async def test_a_stages_overload_may_be_retried() -> None:
    error = from_rpc("vae", await answer(OVERLOADED))
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.retry_after_s == 1.25


async def test_two_errors_of_two_stages_do_not_share_a_status() -> None:
    first = from_rpc("lm", await answer(INVALID))
    second = from_rpc("lm", await answer(OVERLOADED))
    assert (first.code, second.code) == (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert StageError.code is grpc.StatusCode.INTERNAL


async def test_a_stage_that_is_not_there_is_unavailable_with_a_delay(unused_port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{unused_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await StageServiceStub(channel).Describe(DescribeRequest())
    error = from_rpc("lm", caught.value)
    assert isinstance(error, StageUnavailableError)
    assert error.retry_after_s == 1.0


async def test_what_we_did_not_foresee_is_internal_and_tells_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    error = await answer(RuntimeError("secret path /srv/weights"))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert read_details(error).reason == "INTERNAL"
    for part in (error.details() or "", repr(error.trailing_metadata())):
        assert "secret" not in part
        assert "Traceback" not in part
    assert "secret path" in capsys.readouterr().out  # the log has it


@pytest.mark.parametrize("wanted", ["", "abc"])
def test_a_fingerprint_that_is_not_asked_for_or_the_same_is_fine(wanted: str) -> None:
    check_fingerprint(wanted, "abc")


def test_another_fingerprint_names_both() -> None:
    with pytest.raises(ModelMismatchError) as caught:
        check_fingerprint("abd", "abc")
    assert caught.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.metadata == {"wanted": "abd", "loaded": "abc"}
