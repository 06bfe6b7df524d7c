"""soundstage score, against a gateway that scores every caption by its length."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf.json_format import MessageToJson
from typer.testing import CliRunner

from soundstage.music.v1.composer_service_pb2 import ScoreSongRequest, ScoreSongResponse
from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.type.v1.score_pb2 import Likelihood, LikelihoodPart, SongMetadata
from soundstage_cli.app import app


class Scoring:
    """Keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[ScoreSongRequest] = []

    def answer(self, request: ScoreSongRequest, _: grpc.ServicerContext) -> ScoreSongResponse:
        self.asked.append(request)
        part = LikelihoodPart(name="caption", score=len(request.caption) / 100)
        return ScoreSongResponse(likelihood=Likelihood(total=0.5, parts=[part]))


@pytest.fixture
def scoring() -> Scoring:
    return Scoring()


@pytest.fixture
def gateway(scoring: Scoring) -> Iterator[str]:
    """The address of a gateway."""
    method = grpc.unary_unary_rpc_method_handler(
        scoring.answer,
        request_deserializer=ScoreSongRequest.FromString,
        response_serializer=ScoreSongResponse.SerializeToString,
    )
    server = grpc.server(ThreadPoolExecutor(1))
    service = grpc.method_handlers_generic_handler("soundstage.music.v1.ComposerService", {"ScoreSong": method})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_plan_is_scored_part_by_part(gateway: str, scoring: Scoring, tmp_path: Path) -> None:
    plan = GenerateSongRequest(caption="soft", instrumental=True, codes=[1, 2], metadata=SongMetadata(bpm=90))
    file = tmp_path / "plan.json"
    file.write_text(MessageToJson(plan))
    done = CliRunner().invoke(app, ["score", str(file), "--spread", "0.5", "--gateway", gateway])
    assert (done.exit_code, done.stdout) == (0, "caption: 0.0400\ntotal: 0.5000\n")
    assert scoring.asked == [
        ScoreSongRequest(
            codes=[1, 2], caption="soft", lyrics="[Instrumental]", metadata=SongMetadata(bpm=90), spread=0.5
        )
    ]


def test_a_file_that_is_no_request_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("[1, 2]")
    done = CliRunner().invoke(app, ["score", str(file)])
    assert done.exit_code == 2
    assert "is no request in JSON: it must begin with {" in done.stderr
