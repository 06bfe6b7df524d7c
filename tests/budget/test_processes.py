"""Processes that are told how much memory they may take: they stay within it, or do not start and say why."""

import asyncio
import json
import re
import subprocess
import sys
import warnings
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest, DenoiseSetup, TokenizeRequest, TokenizeSetup
from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceStub
from soundstage.stage.v1.lm_service_pb2 import ComposeRequest, ScoreRequest
from soundstage.stage.v1.lm_service_pb2_grpc import LmServiceStub
from soundstage.stage.v1.stage_service_pb2 import DescribeRequest
from soundstage.stage.v1.stage_service_pb2_grpc import StageServiceStub
from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeSetup, EncodeRequest, EncodeSetup
from soundstage.stage.v1.vae_service_pb2_grpc import VaeServiceStub
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32, AudioChunk
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage.type.v1.task_pb2 import Cover, Task
from soundstage.type.v1.tensor_pb2 import DATA_TYPE_FLOAT32
from soundstage_cli.tiny.dit import TINY as TINY_DIT
from soundstage_cli.tiny.dit import write_original
from soundstage_cli.tiny.lm import TINY, write_lm
from soundstage_cli.tiny.vae import write_vae
from soundstage_runtime.tensors import latent_chunks

MIB = 1 << 20
Call = Callable[[grpc.aio.Channel, int], Awaitable[None]]
Refuse = Callable[[grpc.aio.Channel, float], Awaitable[None]]
LARGE = 8  # of a hundred requests the first so many hold much at once, where they are let


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec whose decoder is wide where a frame has few steps: long windows take much memory and little time."""
    folder = tmp_path_factory.mktemp("vae")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        write_vae(folder, channels=32, multiples=(1, 4, 1, 1, 1))
    return folder


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow planner with many heads: 128 KiB of keys and values for every token."""
    folder = tmp_path_factory.mktemp("lm")
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 128, "num_hidden_layers": 8}
    write_lm(folder, shape=replace(TINY, num_codes=8_000, **heads))
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow diffusion model with many heads: it remembers 128 KiB of every token of a song's words."""
    many = TINY_DIT.encoder | {"num_attention_heads": 16, "num_key_value_heads": 16}
    size = replace(TINY_DIT, encoder=many, head_dim=64, layers=16)
    return write_original(tmp_path_factory.mktemp("dit"), size=size)


def peak_bytes(status: str) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@cache
def bare_import_bytes(stage: str) -> int:
    """What a stage's modules take before they do anything."""
    script = f"import soundstage_{stage}.__main__; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return peak_bytes(done.stdout)


@asynccontextmanager
async def serving(stage: str, model: Path, *arguments: str) -> AsyncGenerator[tuple[grpc.aio.Channel, int]]:
    """Run a stage; gives a channel to it, and its process id."""
    command = [
        sys.executable,
        "-m",
        f"soundstage_{stage}",
        "--model",
        str(model),
        "--port",
        "0",
        "--log-format",
        "json",
    ]
    process = await asyncio.create_subprocess_exec(*command, *arguments, "--max-waiting", "100", stderr=PIPE)
    assert process.stderr is not None
    try:
        lines = [line async for line in until_ready(process.stderr)]
        assert lines
        assert lines[-1].get("event") == "ready", lines
        reader = asyncio.create_task(process.stderr.read())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{lines[-1]['port']}") as channel:
            yield channel, process.pid
        process.terminate()
        await reader
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def until_ready(errors: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    async for line in errors:
        event = json.loads(line) if line.startswith(b"{") else {"event": line.decode()}
        yield event
        if event["event"] == "ready":
            return


async def code(channel: grpc.aio.Channel, number: int) -> None:
    """Decode or encode a sound, the first one long and the others short."""
    frames = 1000 if number == 0 else (1, 3, 2, 4)[number // 2 % 4]
    stub = VaeServiceStub(channel)
    if number % 2 == 0:
        chunks = latent_chunks(np.zeros((frames, 64), np.float32), DATA_TYPE_FLOAT32)
        latents = [DecodeRequest(latents=chunk) for chunk in chunks]
        async for _ in stub.Decode(iter([DecodeRequest(setup=DecodeSetup(latent_frames=frames)), *latents])):
            pass
        return
    setup = EncodeSetup(frame_count=frames * 1920, sample_format=SAMPLE_FORMAT_F32, seed=number)
    second = [AudioChunk(first_frame=first * 1920, frame_count=1920, data=bytes(1920 * 8)) for first in range(frames)]
    async for _ in stub.Encode(iter([EncodeRequest(setup=setup), *(EncodeRequest(audio=chunk) for chunk in second)])):
        pass


async def compose(channel: grpc.aio.Channel, number: int) -> None:
    """Compose a few seconds, of many words in the first songs, or score words, by turns."""
    stub = LmServiceStub(channel)
    if number % 4 == 3 and number >= LARGE:
        await stub.Score(ScoreRequest(codes=[7] * (50 + number), caption="a bright tune", lyrics="la la la"))
        return
    request = ComposeRequest(
        caption="a bright tune",
        lyrics="la " * (280 if number < LARGE else number % 40),
        # So long that the first is still sung when the words of the last are read.
        metadata=SongMetadata(duration_s=18 if number < LARGE else 1 + number % 2),
        write_metadata=False,
        rewrite_caption=False,
        detect_language=False,
    )
    async for _ in stub.Compose(request):
        pass


async def denoise(channel: grpc.aio.Channel, number: int) -> None:
    """Make a song of words, many in the first songs, of codes or over a source, or tokenize one, by turns."""
    stub, frames = DitServiceStub(channel), 25 * (1 + number % 7)
    latents = list(latent_chunks(np.zeros((frames, 64), np.float32), DATA_TYPE_FLOAT32))
    if number % 4 == 3 and number >= LARGE:
        pieces = [TokenizeRequest(latents=chunk) for chunk in latents]
        await stub.Tokenize(iter([TokenizeRequest(setup=TokenizeSetup(latent_frames=frames)), *pieces]))
        return
    setup = DenoiseSetup(
        caption="a bright tune",
        lyrics="la " * (680 if number < LARGE else number % 40),
        latent_frames=frames,
        codes=[7] * (frames // 5) if number % 4 == 1 else [],
        options=DiffusionOptions(steps=2),
    )
    source: list[DenoiseRequest] = []
    if number % 4 == 2:
        setup.task.CopyFrom(Task(cover=Cover()))
        setup.source_frames = frames
        source = [DenoiseRequest(source=chunk) for chunk in latents]
    async for _ in stub.Denoise(iter([DenoiseRequest(setup=setup), *source])):
        pass


async def code_none(_channel: grpc.aio.Channel, _longest_s: float) -> None:
    """No sound is too long for a codec."""


async def compose_long(channel: grpc.aio.Channel, longest_s: float) -> None:
    """Ask for a song that there is no room for."""
    request = ComposeRequest(caption="x", metadata=SongMetadata(duration_s=600))
    with pytest.raises(grpc.aio.AioRpcError, match=f"duration_s is 600; must be 1 to {longest_s:g}"):
        [answer async for answer in LmServiceStub(channel).Compose(request)]


async def denoise_long(channel: grpc.aio.Channel, longest_s: float) -> None:
    """Ask for latents that there is no room for."""
    request = DenoiseRequest(setup=DenoiseSetup(latent_frames=15_000))
    with pytest.raises(grpc.aio.AioRpcError, match=f"latent_frames is 15000; must be 1 to {25 * longest_s:g}"):
        [answer async for answer in DitServiceStub(channel).Denoise(iter([request]))]


async def taken(process: int, stage: str) -> int:
    """How many bytes a process has had at most, beside what its modules take."""
    return peak_bytes(await asyncio.to_thread(Path(f"/proc/{process}/status").read_text)) - bare_import_bytes(stage)


@pytest.mark.soak
@pytest.mark.timeout(600)  # two processes, a minute of a core for each
@pytest.mark.parametrize(
    ("stage", "call", "refuse", "flags"),
    [
        ("vae", code, code_none, ("--first-window-frames", "2048", "--window-frames", "2048")),
        ("lm", compose, compose_long, ()),
        ("dit", denoise, denoise_long, ()),
    ],
)
async def test_a_gigabyte_is_kept_to_over_a_hundred_mixed_requests_that_would_take_more(
    stage: str, call: Call, refuse: Refuse, flags: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(stage)
    async with serving(stage, model, *flags) as (channel, process):
        await asyncio.gather(*(call(channel, number) for number in range(LARGE)))
        assert await taken(process, stage) > 1024 * MIB
    async with serving(stage, model, *flags, "--gpu-memory", "1GiB") as (channel, process):
        described = await StageServiceStub(channel).Describe(DescribeRequest())
        await refuse(channel, described.max_duration_s)
        await asyncio.gather(*(call(channel, number) for number in range(100)))
        assert 0 < await taken(process, stage) < 1024 * MIB


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("vae", r"gives vae 50\.0 MiB; oobleck in float32 needs at least \S+ [GM]iB \(weights .*\): give it that much"),
        ("lm", r"gives lm 50\.0 MiB; 64x8 in float32 needs at least \S+ [GM]iB \(weights .*\): give it that much"),
    ],
)
def test_a_budget_too_small_ends_the_process_with_the_figures(
    stage: str, words: str, request: pytest.FixtureRequest
) -> None:
    command = [sys.executable, "-m", f"soundstage_{stage}", "--model", str(request.getfixturevalue(stage))]
    done = subprocess.run([*command, "--gpu-memory", "50MiB"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(words, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
