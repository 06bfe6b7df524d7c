"""Songs in the making at once: while one is decoded, the next is planned and denoised."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np

from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, GenerateSongRequest, GenerateSongResponse
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32

from .conftest import STEPS, Deploy, Steady


@dataclass
class Held(Steady):
    """A stage that stops in the middle of its work until the gate opens."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def between(self) -> None:
        await self.gate.wait()


async def read_to(kind: str, events: AsyncIterator[GenerateSongResponse]) -> list[GenerateSongResponse]:
    """Read events up to the first of a kind, that one included."""
    read: list[GenerateSongResponse] = []
    async for event in events:
        read.append(event)
        if event.WhichOneof("event") == kind:
            return read
    raise AssertionError(f"the song ended without {kind}")


def samples_of(events: list[GenerateSongResponse]) -> list[float]:
    """The sample that each latent frame was made into, in steps of S16."""
    data = b"".join(event.audio_chunk.data for event in events)
    return list(np.frombuffer(data, "<f4")[:: 1920 * 2] * np.float32(32_767))


async def test_a_song_is_planned_and_denoised_while_the_codec_is_held_in_the_one_before(deploy: Deploy) -> None:
    codec = Held("vae")
    async with deploy(codec) as deployment, asyncio.timeout(10):

        def order(seed: int) -> AsyncIterator[GenerateSongResponse]:
            request = GenerateSongRequest(caption="x", seeds=[seed])
            request.metadata.duration_s = 4
            request.output.format.sample_format = SAMPLE_FORMAT_F32
            return aiter(SongServiceStub(deployment.channel).GenerateSong(request))

        first = order(7)
        first_events = await read_to("audio_chunk", first)
        second = order(8)
        second_events = await read_to("audio_header", second)  # comes when the latents are whole and kept
        progress = {event.progress.stage: event.progress.done for event in second_events if event.HasField("progress")}
        assert progress == {STAGE_LM: 20, STAGE_DIT: STEPS}

        codec.gate.set()
        for seed, events, rest in ((7, first_events, first), (8, second_events, second)):
            events += [event async for event in rest]
            assert events[-1].HasField("completed")
            np.testing.assert_allclose(samples_of(events), np.arange(100) + seed, rtol=0, atol=1e-4)
