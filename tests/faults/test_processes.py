"""Processes that die, come back, or are told to stop."""

import asyncio
import io
import signal
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest
import soundfile

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_LM,
    CreateSongRequest,
    GenerateSongRequest,
    StreamAudioRequest,
    WatchSongRequest,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_cli.models import find_models
from soundstage_cli.stack import ProcessDiedError, Stack
from soundstage_runtime.errors import read_details

if TYPE_CHECKING:
    from soundstage.music.v1.song_service_pb2_grpc import SongServiceAsyncStub


@pytest.fixture
async def stack(models: Path) -> AsyncGenerator[Stack, None]:
    stack = Stack(find_models(models / "original"))
    await stack.start()
    yield stack
    await stack.stop()


def song(duration_s: float) -> GenerateSongRequest:
    request = GenerateSongRequest(caption="a bright tune", seeds=[7])
    request.metadata.duration_s = duration_s
    return request


def long_song(name: str) -> GenerateSongRequest:
    """A song that keeps the named stage at work for long."""
    request = song(600)
    request.planner.enabled = name == "lm"
    request.diffusion.steps = 20 if name == "dit" else 1
    return request


async def test_a_killed_stage_is_unavailable_with_a_reason_and_serves_again_when_back(stack: Stack) -> None:
    async with grpc.aio.insecure_channel(stack.target) as channel:
        for name in ("lm", "dit", "vae"):
            call = SongServiceStub(channel).GenerateSong(long_song(name))
            async for event in call:
                at_work = {STAGE_LM: "lm", STAGE_DIT: "dit"}.get(event.progress.stage, "")
                if name == (at_work or ("vae" if event.HasField("audio_chunk") else "")):
                    break
            process = stack.members[name].process
            assert process is not None
            process.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [event async for event in call]
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            details = read_details(caught.value)
            assert (details.reason, details.metadata["stage"]) == ("STAGE_UNAVAILABLE", name)
            await process.wait()
            await stack.spawn(name)
            await stack.wait_until_ready()
            async with asyncio.timeout(20):
                while not await is_made(channel):
                    pass


async def test_a_killed_gateway_goes_on_with_a_song_whose_source_was_a_file(models: Path, tmp_path: Path) -> None:
    stack = Stack(find_models(models / "original"), flags={"gateway": ["--data-dir", str(tmp_path)]})
    await stack.start()
    try:
        async with grpc.aio.insecure_channel(stack.target) as channel:
            samples = 0.1 * np.random.default_rng(0).standard_normal((2 * 48_000, 2))
            file = io.BytesIO()
            soundfile.write(file, samples, 48_000, format="FLAC")
            data = file.getvalue()
            parts = (UploadAudioRequest(data=data[first : first + 500_000]) for first in range(0, len(data), 500_000))
            asset = (await AudioServiceStub(channel).UploadAudio(parts)).asset
            request = GenerateSongRequest(caption="x", source=asset, seeds=[7])
            request.task.repaint.start_s, request.task.repaint.end_s = 0.5, 1.5
            request.diffusion.steps = 20
            songs = SongServiceStub(channel)
            unbroken = (await songs.CreateSong(CreateSongRequest(request=request))).song.name
            await watch(songs, unbroken)
            broken = (await songs.CreateSong(CreateSongRequest(request=request))).song.name
            async for event in songs.WatchSong(WatchSongRequest(song=broken)):
                if event.event.progress.stage == STAGE_DIT:
                    break
            process = stack.members["gateway"].process
            assert process is not None
            process.kill()
            await process.wait()
            await stack.spawn("gateway")
            await stack.wait_until_ready()
            async with asyncio.timeout(60):
                await watch(songs, broken)
            heard = [
                b"".join([event.audio_chunk.data async for event in songs.StreamAudio(StreamAudioRequest(song=song))])
                for song in (unbroken, broken)
            ]
    finally:
        await stack.stop()
    assert len(heard[0]) == 2 * 48_000 * 4
    assert heard[0] == heard[1]


async def watch(songs: "SongServiceAsyncStub", song: str) -> None:
    """Watch a song to its end, again and again while its gateway is away."""
    while True:
        try:
            async for _ in songs.WatchSong(WatchSongRequest(song=song), wait_for_ready=True):
                pass
            break
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            await asyncio.sleep(0.1)


async def is_made(channel: grpc.aio.Channel) -> bool:
    try:
        events = [event async for event in SongServiceStub(channel).GenerateSong(song(1))]
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        return False
    return events[-1].HasField("completed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stopping_up_lets_a_song_in_flight_end(models: Path, number: signal.Signals) -> None:
    command = ["-m", "soundstage_cli.app", "up", "--models", str(models / "original"), "--port", "0"]
    up = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE, stderr=DEVNULL)
    assert up.stdout is not None
    address = (await up.stdout.readline()).decode().split()[-1]
    async with grpc.aio.insecure_channel(address) as channel:
        call = SongServiceStub(channel).GenerateSong(song(20))
        await anext(aiter(call))
        up.send_signal(number)
        events = [event async for event in call]
    assert events[-1].completed.frame_count == 20 * 48_000
    assert await up.wait() == 0


def test_up_says_which_process_died_and_why(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "soundstage_cli.app", "up", "--models", str(models / "original"), "--port", "0"]
    done = subprocess.run([*command, "--vae", str(tmp_path)], capture_output=True, timeout=120, check=False)
    assert done.returncode == 1
    assert b"vae died (exit status " in done.stderr
    assert f"{tmp_path / 'config.json'} is missing".encode() in done.stderr.replace(b"\n", b"")
    assert b"Traceback" not in done.stderr


async def test_a_stage_that_dies_is_noticed(stack: Stack) -> None:
    process = stack.members["dit"].process
    assert process is not None
    process.kill()
    with pytest.raises(ProcessDiedError, match="dit died \\(killed by SIGKILL\\)"):
        async with asyncio.timeout(10):
            await stack.watch()
