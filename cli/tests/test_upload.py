"""Files that the gateway refuses, told of by their names and options."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import grpc
import pytest
from grpc_status import rpc_status
from typer.testing import CliRunner

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest, UploadAudioResponse
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceServicer, add_AudioServiceServicer_to_server
from soundstage.music.v1.song_service_pb2 import CreateSongRequest, CreateSongResponse
from soundstage.music.v1.song_service_pb2_grpc import add_SongServiceServicer_to_server
from soundstage_cli.app import app
from soundstage_runtime.errors import InvalidRequestError, Violation, to_status

from .conftest import Keeping


def refuse(context: grpc.ServicerContext, field: str, description: str) -> NoReturn:
    error = InvalidRequestError([Violation(field=field, description=description)])
    context.abort_with_status(rpc_status.to_status(to_status(error)))


class Listening(AudioServiceServicer):
    """Names a file by its first word, and cannot decode text."""

    def UploadAudio(
        self, request_iterator: Iterator[UploadAudioRequest], context: grpc.ServicerContext
    ) -> UploadAudioResponse:
        data = b"".join(part.data for part in request_iterator)
        if data == b"text":
            refuse(context, "data", "cannot be decoded; send a whole file")
        return UploadAudioResponse(asset=f"assets/{data.decode()}")


class Picky(Keeping):
    """Wants references that can be heard."""

    def CreateSong(self, request: CreateSongRequest, context: grpc.ServicerContext) -> CreateSongResponse:
        for index, name in enumerate(request.request.references):
            if name == "assets/silence":
                refuse(context, f"references[{index}]", f"is {name}, which is silent; give another")
        return super().CreateSong(request, context)


@pytest.fixture
def gateway() -> Iterator[str]:
    """The address of a gateway."""
    server = grpc.server(ThreadPoolExecutor(2))
    add_AudioServiceServicer_to_server(Listening(), server)
    add_SongServiceServicer_to_server(Picky(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--reference", "tune", "--reference", "text"], "--reference: is 'text': the file cannot be decoded; send"),
        (["--task", "cover", "--source", "text"], "--source: is 'text': the file cannot be decoded; send"),
        (["--reference", "tune", "--reference", "silence"], "--reference: is 'silence', which is silent; give another"),
    ],
)
def test_a_file_that_is_refused_is_named_with_its_option(
    gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tune", "text", "silence"):
        Path(name).write_text(name)
    done = CliRunner().invoke(app, ["generate", "x", *options, "--gateway", gateway])
    assert done.exit_code == 2
    assert complaint in " ".join(done.stderr.replace("│", " ").split())
