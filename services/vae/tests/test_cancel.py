"""What happens to a song that nobody waits for any more: its tiles stop, its place is free."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeSetup
from soundstage.stage.v1.vae_service_pb2_grpc import VaeServiceStub
from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_runtime.admission import Admission
from soundstage_runtime.tensors import to_proto
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec, NotFiniteError
from soundstage_vae.engine import VaeEngine
from soundstage_vae.tiling import DECODE_CONTEXT, plan_tiles

Serving = Callable[..., AbstractAsyncContextManager[grpc.aio.Channel]]

LATENTS = np.zeros((200, 64), np.float32)
REQUESTS = (
    DecodeRequest(setup=DecodeSetup(latent_frames=len(LATENTS))),
    DecodeRequest(latents=LatentChunk(tensor=to_proto(LATENTS))),
)


class Gated(Codec):
    """Lets tiles through as its gate allows, and counts those that have begun and ended."""

    def __init__(self, folder: Path, open_for: int) -> None:
        super().__init__(folder, device=torch.device("cpu"), dtype=torch.float32)
        self.gate = threading.Semaphore(open_for)
        self.begun = self.ended = 0

    def decode_batch(
        self, windows: Sequence[NDArray[np.float32]], core: range | None = None
    ) -> list[NDArray[np.float32] | NotFiniteError]:
        self.begun += 1
        self.gate.acquire()
        samples = super().decode_batch(windows, core)
        self.ended += 1
        return samples


@pytest.fixture
async def gated(tiny_vae: Path) -> AsyncGenerator[tuple[Gated, VaeEngine]]:
    """The gate lets one tile through and holds the next."""
    codec = Gated(tiny_vae, open_for=1)
    engine = VaeEngine(codec, Worker("vae"), windows=(32,))
    yield codec, engine
    codec.gate.release(100)
    engine.close()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110  the state changes on another thread, or behind the wire
            await asyncio.sleep(0.005)


async def test_a_cancelled_call_frees_its_place_and_stops_within_a_tile(
    gated: tuple[Gated, VaeEngine], serving: Serving
) -> None:
    codec, engine = gated
    admission = Admission("VAE calls", limit=1)
    async with serving(engine, admission) as channel:
        call = VaeServiceStub(channel).Decode(iter(REQUESTS))
        await anext(aiter(call))
        await until(lambda: codec.begun == 2)
        call.cancel()
        await until(lambda: admission.in_flight == 0)
        assert codec.ended == 1
        codec.gate.release(100)
        await until(lambda: codec.ended == 2)
        # The worker takes work in order: were a third tile waiting, it would come before this song's tiles.
        again = [r.audio.frame_count async for r in VaeServiceStub(channel).Decode(iter(REQUESTS))]
    assert sum(again) == 200 * 1920
    assert codec.begun == 2 + len(plan_tiles(200, windows=(32,), context=DECODE_CONTEXT))


async def test_a_deadline_in_the_middle_of_a_song_stops_it(gated: tuple[Gated, VaeEngine], serving: Serving) -> None:
    codec, engine = gated
    admission = Admission("VAE calls", limit=1)
    async with serving(engine, admission) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in VaeServiceStub(channel).Decode(iter(REQUESTS), timeout=1.0):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: admission.in_flight == 0)
        assert codec.begun == 2


async def test_a_client_that_hangs_up_frees_its_place(gated: tuple[Gated, VaeEngine], serving: Serving) -> None:
    _, engine = gated
    admission = Admission("VAE calls", limit=1)
    async with serving(engine, admission) as channel:
        call = VaeServiceStub(channel).Decode(iter(REQUESTS))
        await anext(aiter(call))
        assert admission.in_flight == 1
        await channel.close()
        await until(lambda: admission.in_flight == 0)


async def test_the_loop_stays_free_while_a_tile_is_computed(gated: tuple[Gated, VaeEngine], serving: Serving) -> None:
    codec, engine = gated
    async with serving(engine) as channel:
        first = VaeServiceStub(channel).Decode(iter(REQUESTS))
        await anext(aiter(first))
        await until(lambda: codec.begun == 2)
        # The worker is held inside a tile; a malformed call is still answered.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(VaeServiceStub(channel).Decode(iter(REQUESTS[1:]))))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        first.cancel()
