"""Clients that stop reading: the gateway holds little for each, however long they stay away."""

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, OutputOptions, PlannerOptions, StreamAudioRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32, AudioFormat
from soundstage_cli.models import find_models
from soundstage_cli.stack import Stack

STALLED = 100
CHANNELS = 10
MB = 1 << 20
F32 = OutputOptions(format=AudioFormat(sample_format=SAMPLE_FORMAT_F32))


def memory_bytes(pid: int) -> int:
    """What a process has taken for itself."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) << 10


async def test_a_hundred_stalled_listeners_cost_little_memory(models: Path) -> None:
    stack = Stack(find_models(models / "original"))
    await stack.start()
    process = stack.members["gateway"].process
    assert process is not None
    request = GenerateSongRequest(caption="long", output=F32, planner=PlannerOptions(enabled=False), seeds=[1])
    request.metadata.duration_s = 30  # 11 MB, more than lies on the way to a client
    request.diffusion.steps = 1
    async with AsyncExitStack() as opened:
        opened.push_async_callback(stack.stop)
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await opened.enter_async_context(grpc.aio.insecure_channel(stack.target, options=options))
            for _ in range(CHANNELS)
        ]
        song = ""
        async for event in SongServiceStub(channels[0]).GenerateSong(request):
            song = song or event.accepted.song
        before = memory_bytes(process.pid)
        calls = [
            SongServiceStub(channels[number % CHANNELS]).StreamAudio(StreamAudioRequest(song=song, output=F32))
            for number in range(STALLED)
        ]
        for call in calls:
            opened.callback(call.cancel)
            await anext(aiter(call))  # pyright: ignore[reportArgumentType]
        samples: list[int] = []
        for _ in range(8):
            await asyncio.sleep(0.5)
            samples.append(memory_bytes(process.pid))
        assert max(samples) - before < STALLED * 2 * MB  # a chunk of half a second, at each step of its way out
        assert samples[-1] - samples[3] < 8 * MB
