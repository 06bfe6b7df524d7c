"""The channel to a gateway, and the key that it carries."""

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import typer

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest, UploadAudioResponse
from soundstage.music.v1.audio_service_pb2_grpc import (
    AudioServiceServicer,
    AudioServiceStub,
    add_AudioServiceServicer_to_server,
)
from soundstage.music.v1.song_service_pb2 import (
    GetSongRequest,
    GetSongResponse,
    WatchSongRequest,
    WatchSongResponse,
)
from soundstage.music.v1.song_service_pb2_grpc import (
    SongServiceServicer,
    SongServiceStub,
    add_SongServiceServicer_to_server,
)
from soundstage_cli.channel import KEY_VARIABLE, open_channel
from soundstage_runtime.serve import Server, Service


class Songs(SongServiceServicer):
    """Answers at once."""

    async def GetSong(self, request: GetSongRequest, context: Any) -> GetSongResponse:
        return GetSongResponse()

    async def WatchSong(self, request: WatchSongRequest, context: Any) -> AsyncIterator[WatchSongResponse]:
        yield WatchSongResponse()


class Audio(AudioServiceServicer):
    """Counts what it is sent."""

    async def UploadAudio(
        self, request_iterator: AsyncIterator[UploadAudioRequest], context: Any
    ) -> UploadAudioResponse:
        return UploadAudioResponse(channels=len([request async for request in request_iterator]))


@pytest.mark.parametrize(("key", "header"), [("", ""), ("open sesame", "Bearer open sesame")])
async def test_the_key_goes_with_every_call(monkeypatch: pytest.MonkeyPatch, key: str, header: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    heard: list[str] = []
    services = [
        Service(name="songs", add=lambda server: add_SongServiceServicer_to_server(cast(Any, Songs)(), server)),
        Service(name="audio", add=lambda server: add_AudioServiceServicer_to_server(Audio(), server)),
    ]
    async with Server(services, check=heard.append) as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        await SongServiceStub(channel).GetSong(GetSongRequest())
        assert len([response async for response in SongServiceStub(channel).WatchSong(WatchSongRequest())]) == 1
        answer = await AudioServiceStub(channel).UploadAudio(UploadAudioRequest() for _ in range(3))
    assert answer.channels == 3
    assert heard == [header] * 3


def test_a_key_that_cannot_be_sent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "schlüssel")
    with pytest.raises(typer.BadParameter, match="ASCII"):
        open_channel("127.0.0.1:1")
