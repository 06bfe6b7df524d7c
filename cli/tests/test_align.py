"""soundstage align, against a gateway that knows one song."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from soundstage.music.v1.song_service_pb2 import AlignLyricsRequest, AlignLyricsResponse
from soundstage_cli.app import app


def answer(request: AlignLyricsRequest, context: grpc.ServicerContext) -> AlignLyricsResponse:
    """A gateway that knows the second variant of songs/a."""
    if (request.song, request.variant) != ("songs/a", 1):
        context.abort(grpc.StatusCode.NOT_FOUND, f"no variant {request.variant} of {request.song}")
    return AlignLyricsResponse(lrc="[00:01.00]la\n", score=0.25)


@pytest.fixture
def gateway() -> Iterator[str]:
    """The address of a gateway."""
    method = grpc.unary_unary_rpc_method_handler(
        answer,
        request_deserializer=AlignLyricsRequest.FromString,
        response_serializer=AlignLyricsResponse.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(1))
    service = grpc.method_handlers_generic_handler("soundstage.music.v1.SongService", {"AlignLyrics": method})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_lines_go_to_stdout_or_into_a_file(gateway: str, tmp_path: Path) -> None:
    options = ["align", "songs/a", "--variant", "2", "--gateway", gateway]
    shown = CliRunner().invoke(app, options)
    assert (shown.exit_code, shown.stdout) == (0, "[00:01.00]la\n")
    assert "25%" in shown.stderr
    file = tmp_path / "song.lrc"
    assert CliRunner().invoke(app, [*options, "-o", str(file)]).stdout == ""
    assert file.read_text() == "[00:01.00]la\n"
    assert CliRunner().invoke(app, [*options, "-o", str(tmp_path)]).exit_code == 2


def test_a_song_that_is_not_known_is_an_error_in_words(gateway: str) -> None:
    done = CliRunner().invoke(app, ["align", "songs/a", "--gateway", gateway])
    assert done.exit_code == 1
    assert "no variant 0 of songs/a" in done.stderr
