"""Who may come in, through either door."""

import os
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import httpx2
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, ListSongsRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_gateway.keys import Keys, KeyUnknownError
from soundstage_runtime.errors import StartError, read_details

from .conftest import Deploy, Deployment

CASES = [
    (None, "KEY_MISSING"),
    ("", "KEY_MISSING"),
    ("Basic b3Blbjpz", "KEY_MISSING"),
    ("Bearer wrong", "KEY_UNKNOWN"),
    ("Bearer # of Ann", "KEY_UNKNOWN"),
    ("Bearer open sesame", None),
    ("bearer other", None),
]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# of Ann\nopen sesame\n\nother # of Bob\n")
    return file


async def grpc_reason(deployment: Deployment, authorization: str | None) -> str | None:
    """The reason why a unary, a streamed and a streaming call are refused; None when they are not."""
    metadata = None if authorization is None else (("authorization", authorization),)
    song, audio = SongServiceStub(deployment.channel), AudioServiceStub(deployment.channel)

    async def generate() -> None:
        async for _ in song.GenerateSong(GenerateSongRequest(caption="a"), metadata=metadata):
            break

    reasons: set[str | None] = set()
    for call in (
        lambda: song.ListSongs(ListSongsRequest(), metadata=metadata),
        generate,
        lambda: audio.UploadAudio(iter([UploadAudioRequest(data=b"no music")]), metadata=metadata),
    ):
        try:
            await call()
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                reasons.add(read_details(error).reason)
                continue
        reasons.add(None)
    [reason] = reasons
    return reason


@pytest.mark.parametrize(("authorization", "reason"), CASES)
async def test_grpc_lets_in_who_has_a_key(
    deploy: Deploy, keys_file: Path, authorization: str | None, reason: str | None
) -> None:
    async with deploy(keys_file=keys_file) as deployment:
        assert await grpc_reason(deployment, authorization) == reason
        health = await cast(Any, HealthStub(deployment.channel)).Check(HealthCheckRequest())
    assert health.status == HealthCheckResponse.SERVING


@pytest.mark.parametrize(("authorization", "reason"), CASES)
async def test_http_lets_in_who_has_a_key(
    deploy: Deploy, keys_file: Path, authorization: str | None, reason: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    async with (
        deploy(keys_file=keys_file) as deployment,
        httpx2.AsyncClient(base_url=deployment.http, headers=headers) as http,
    ):
        answers = [
            await http.get("/v1/songs"),
            await http.post("/v1/songs", json={"caption": "a"}),
            await http.get("/metrics"),
            await http.get("/v2"),
        ]
        statuses = [(await http.get(path)).status_code for path in ("/healthz", "/", "/static/page.js")]
    if reason is None:
        assert [answer.status_code for answer in answers] == [200, 201, 200, 404]
    else:
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["reason"]) == (401, reason)
            assert answer.headers["www-authenticate"].startswith("Bearer")
    assert statuses == [200, 200, 200]


@pytest.mark.parametrize(("path", "host"), [("/v1/songs", "a/static/?"), ("/health%0Az", "a")])
async def test_what_is_open_is_told_by_the_path_that_is_served(
    deploy: Deploy, keys_file: Path, path: str, host: str
) -> None:
    async with deploy(keys_file=keys_file) as deployment, httpx2.AsyncClient(base_url=deployment.http) as http:
        assert (await http.get(path, headers={"Host": host})).status_code == 401


async def test_players_give_their_key_in_the_address(deploy: Deploy, keys_file: Path) -> None:
    async with deploy(keys_file=keys_file) as deployment, httpx2.AsyncClient(base_url=deployment.http) as http:
        made = await http.post("/v1/songs?key=other", json={"caption": "a", "metadata": {"durationS": 3}})
        path = made.headers["location"]
        assert (await http.get(f"{path}/audio.wav?key=other")).status_code == 200
        playlist = (await http.get(f"{path}/hls/index.m3u8?key=other&variant=0")).text
        files = [line for line in playlist.splitlines() if not line.startswith("#")]
        assert files
        for file in ["init.mp4?key=other&variant=0", *files]:
            assert (await http.get(f"{path}/hls/{file}")).status_code == 200
        assert (await http.get(f"{path}/hls/{files[0].partition('?')[0]}")).status_code == 401
        assert (await http.get(f"{path}/audio.wav?key=wrong")).status_code == 401


def test_a_file_that_changes_is_read_again(keys_file: Path) -> None:
    keys = Keys(keys_file)
    keys.check("Bearer other")
    keys_file.write_text("another\n")
    os.utime(keys_file, ns=(1, 1))
    keys.check("Bearer another")
    with pytest.raises(KeyUnknownError):
        keys.check("Bearer other")
    keys_file.unlink()
    keys.check("Bearer another")  # while the file is replaced, the keys of before hold


def test_a_file_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="keys"):
        Keys(tmp_path / "none")


def test_odd_keys_are_only_unknown(keys_file: Path) -> None:
    for key in ("Bearer \udcff", "Bearer \x00", "Bearer " + "a" * 100_000):
        with pytest.raises(KeyUnknownError):
            Keys(keys_file).check(key)
