import json
import logging

import pytest
import structlog

from soundstage_runtime import logs


@pytest.fixture(autouse=True)
def restore_logging() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield None
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def fail_with(lyrics: str) -> None:
    words = lyrics.upper()
    raise ValueError(len(words))


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_logged_error_holds_its_traceback_and_no_words_of_users(
    log_format: logs.LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("lm", log_format=log_format, log_level="info")
    try:
        fail_with("terces a"[::-1])  # not in the source line that a traceback quotes
    except ValueError:
        structlog.get_logger().exception("rpc_failed", method="/x")
    written = capsys.readouterr().err
    assert "fail_with" in written
    assert "ValueError" in written
    assert "secret" not in written.lower()


def test_json_lines_carry_the_process_the_event_and_what_is_bound(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("lm", log_format="json", log_level="info")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger().info("token_drawn", code=7)
    logging.getLogger("a.library").warning("beware of %s", "this")
    structlog.get_logger().debug("not_shown")
    ours, theirs = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert ours.items() >= {"process": "lm", "event": "token_drawn", "code": 7, "request_id": "r1"}.items()
    assert theirs.items() >= {"process": "lm", "event": "beware of this", "level": "warning"}.items()
