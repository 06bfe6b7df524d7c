"""UploadAudio over real gRPC."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable

import grpc
import grpc.aio
import numpy as np
import pytest

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest, UploadAudioResponse
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub, add_AudioServiceServicer_to_server
from soundstage_gateway.assets import Assets
from soundstage_gateway.audio_file import Recording
from soundstage_gateway.audio_servicer import MAX_FILE_BYTES, MAX_MESSAGE_BYTES, AudioServicer
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import read_details
from soundstage_runtime.serve import Server, Service

from .conftest import Deploy, Deployment
from .files import sound_file, tone, words

FLAC = sound_file(words(48_000), 48_000, "FLAC", "PCM_16")


def cut(data: bytes, size: int = 10_000) -> list[bytes]:
    return [data[first : first + size] for first in range(0, len(data), size)]


async def upload(deployment: Deployment, parts: Iterable[bytes]) -> UploadAudioResponse:
    return await AudioServiceStub(deployment.channel).UploadAudio(UploadAudioRequest(data=part) for part in parts)


async def refusal(deployment: Deployment, parts: Iterable[bytes]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await upload(deployment, parts)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = read_details(caught.value).violations
    assert violation.field == "data"
    return violation.description


async def uploads_in_flight(deployment: Deployment, count: int) -> None:
    async with asyncio.timeout(5):
        while deployment.uploads.in_flight != count:
            await AudioServiceStub(deployment.channel).UploadAudio(iter(())).code()  # gives the server its turn


async def test_a_file_becomes_an_asset_that_says_what_it_is(deploy: Deploy) -> None:
    data = sound_file(tone(2, 44_100), 44_100, "MP3")
    async with deploy() as deployment:
        answer = await upload(deployment, cut(data))
        kept = deployment.assets.find(answer.asset)
    assert kept is not None
    assert kept.samples.shape == (96_000, 2)
    assert (answer.duration_s, answer.sample_rate_hz, answer.channels) == (2, 44_100, 1)
    assert answer.sha256 == hashlib.sha256(data).digest()
    assert answer.asset == f"assets/{answer.sha256.hex()[:32]}"


async def test_the_same_file_is_kept_once_however_it_is_cut(deploy: Deploy) -> None:
    async with deploy() as deployment:
        first = await upload(deployment, cut(FLAC))
        size_bytes = deployment.assets.size_bytes
        assert await upload(deployment, cut(FLAC, 777)) == first
        assert deployment.assets.size_bytes == size_bytes == 48_000 * 2 * 4


async def test_bad_files_are_refused_and_leave_nothing(deploy: Deploy) -> None:
    async with deploy() as deployment:
        assert "is empty" in await refusal(deployment, [])
        assert "is empty" in await refusal(deployment, [b"", b""])
        assert "cannot be decoded" in await refusal(deployment, cut(FLAC[:20_000]))
        assert "send at most 1048576 in a message" in await refusal(deployment, [bytes(MAX_MESSAGE_BYTES + 1)])
        assert (deployment.assets.size_bytes, deployment.uploads.in_flight) == (0, 0)


async def test_more_than_a_file_may_hold_is_refused_before_it_is_all_there(deploy: Deploy) -> None:
    async with deploy() as deployment:
        part = UploadAudioRequest(data=bytes(MAX_MESSAGE_BYTES))
        sent = 0

        async def endless() -> AsyncIterator[UploadAudioRequest]:
            nonlocal sent
            while sent <= MAX_FILE_BYTES // MAX_MESSAGE_BYTES:
                sent += 1
                yield part
            await asyncio.Event().wait()  # the status would be lost in a stream that goes on

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await AudioServiceStub(deployment.channel).UploadAudio(endless())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"is more than {MAX_FILE_BYTES} bytes in all" in str(caught.value.details())


async def test_a_cancelled_upload_leaves_nothing_and_frees_its_place(deploy: Deploy) -> None:
    async with deploy() as deployment:
        for _ in range(3):  # there are two places
            call = AudioServiceStub(deployment.channel).UploadAudio()
            await call.write(UploadAudioRequest(data=FLAC))
            await uploads_in_flight(deployment, 1)
            call.cancel()
            await uploads_in_flight(deployment, 0)
        assert deployment.assets.size_bytes == 0
        assert (await upload(deployment, cut(FLAC))).duration_s == 1


async def test_one_more_upload_than_places_is_refused_with_a_time_to_come_back(deploy: Deploy) -> None:
    async with deploy() as deployment:
        calls = [AudioServiceStub(deployment.channel).UploadAudio() for _ in range(2)]
        for call in calls:
            await call.write(UploadAudioRequest(data=b"RIFF"))
        await uploads_in_flight(deployment, 2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await upload(deployment, [FLAC])
        for call in calls:
            call.cancel()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (read_details(caught.value).retry_after_s or 0) > 0


async def test_a_file_that_comes_a_byte_at_a_time_does_not_hold_its_place() -> None:
    uploads = Admission("uploads", limit=1)
    audio = AudioServicer(Assets(limit_bytes=1 << 20), uploads, idle_timeout_s=0.2)
    service = Service(name="audio", add=lambda server: add_AudioServiceServicer_to_server(audio, server))

    async def drip() -> AsyncIterator[UploadAudioRequest]:
        for byte in FLAC[:100]:
            yield UploadAudioRequest(data=bytes([byte]))
            await asyncio.sleep(0.05)

    async with Server([service]) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await AudioServiceStub(channel).UploadAudio(drip())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert read_details(caught.value).reason == "CALLER_STALLED"
        assert uploads.in_flight == 0


def test_the_asset_that_was_used_least_recently_goes_first() -> None:
    assets = Assets(limit_bytes=2 * 800)
    recording = Recording(
        samples=np.zeros((100, 2), np.float32), is_silent=True, sample_rate_hz=48_000, channels=2
    )  # 800 bytes
    assets.keep("a", recording)
    assets.keep("b", recording)
    assert assets.find("a")
    assets.keep("c", recording)
    assert [name for name in "abc" if assets.find(name)] == ["a", "c"]
    assert assets.size_bytes == 1600


def test_one_asset_is_kept_whatever_its_size() -> None:
    assets = Assets(limit_bytes=1)
    large = Recording(samples=np.zeros((100, 2), np.float32), is_silent=True, sample_rate_hz=48_000, channels=2)
    assets.keep("a", large)
    assets.keep("b", large)
    assert [name for name in "ab" if assets.find(name)] == ["b"]
