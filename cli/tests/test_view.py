"""What is said of errors."""

from io import StringIO

import grpc
import grpc.aio
import pytest
from rich.console import Console

from soundstage_cli.view import show_error
from soundstage_runtime.errors import ServiceError, StageError, to_status


@pytest.mark.parametrize(
    ("error", "reason", "hint"),
    [
        (ServiceError("no key came"), "KEY_MISSING", "Set SOUNDSTAGE_KEY"),
        (ServiceError("none of ours"), "KEY_UNKNOWN", "SOUNDSTAGE_KEY is set to a key"),
        (StageError("x", metadata={"stage_reason": "NO_ADAPTER_DIRECTORY"}), "x", "SOUNDSTAGE_DIT_ADAPTER_DIR"),
        (ServiceError("none of ours"), "SONG_UNKNOWN", ""),
    ],
)
def test_an_error_that_the_command_line_can_help_with_has_a_hint(error: ServiceError, reason: str, hint: str) -> None:
    error.reason = reason
    details = grpc.aio.Metadata(("grpc-status-details-bin", to_status(error).SerializeToString()))
    failed = grpc.aio.AioRpcError(grpc.StatusCode.UNAUTHENTICATED, grpc.aio.Metadata(), details, error.message)
    said = StringIO()
    show_error(Console(file=said, width=200), failed, address="here")
    first, *rest = said.getvalue().splitlines()
    assert first == f"UNAUTHENTICATED: {error.message}"
    assert [hint in line for line in rest] == [True] * bool(hint)
