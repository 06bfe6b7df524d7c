"""DitService over real gRPC: a tiny model behind it, or a denoiser that does just what a test wants."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from grpc_status import rpc_status
from numpy.typing import NDArray

from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest, DenoiseResponse, DenoiseSetup
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_dit.alignment import Alignment
from soundstage_dit.engine import DitEngine
from soundstage_dit.request import read_song
from soundstage_dit.servicer import warm_up
from soundstage_dit.song import Song
from soundstage_runtime.tensors import from_proto

from .conftest import Serving

if TYPE_CHECKING:
    from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceAsyncStub


class Stuck:
    """A denoiser that does one step and then waits for ever."""

    model_fingerprint = "f" * 64

    def __init__(self) -> None:
        self.num_songs = 0
        self.was_left = asyncio.Event()

    async def denoise(self, song: Song) -> AsyncGenerator[int | NDArray[np.float32]]:
        self.num_songs += 1
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            self.num_songs -= 1
            self.was_left.set()

    async def tokenize(self, latents: AsyncIterator[NDArray[np.float32]]) -> AsyncGenerator[NDArray[np.int64]]:
        async for _ in latents:
            yield np.zeros(1, np.int64)

    async def align(self, song: Song, latents: NDArray[np.float32]) -> Alignment:
        return Alignment(lines=(), score=0.0)


def setup_of(**fields: object) -> DenoiseSetup:
    """A good setup, with `fields` set."""
    setup = DenoiseSetup(caption="a calm piano", lyrics="la", latent_frames=600, seed=1)
    setup.MergeFrom(DenoiseSetup(**fields))  # pyright: ignore[reportArgumentType]
    return setup


def only(setup: DenoiseSetup) -> Iterator[DenoiseRequest]:
    """The requests of a song without a source."""
    return iter([DenoiseRequest(setup=setup)])


async def collect(stub: "DitServiceAsyncStub", setup: DenoiseSetup) -> list[DenoiseResponse]:
    """All responses of a call."""
    return [response async for response in stub.Denoise(only(setup))]


async def test_progress_comes_once_a_step_and_then_the_latents_in_order(engine: DitEngine) -> None:
    setup = setup_of(options=DiffusionOptions(steps=3))
    async with Serving(engine) as stub:
        responses = await collect(stub, setup)
    progress, chunks = responses[:3], [response.latents for response in responses[3:-1]]
    assert responses[-1].HasField("done")
    assert [(one.progress.step, one.progress.steps) for one in progress] == [(1, 3), (2, 3), (3, 3)]
    assert [(chunk.first_frame, chunk.tensor.shape[0]) for chunk in chunks] == [(0, 256), (256, 256), (512, 88)]
    latents = np.concatenate([from_proto(chunk.tensor, "latents", shape=(None, 64)) for chunk in chunks])
    *_, expected = [event async for event in engine.denoise(read_song(setup, variant="turbo"))]
    assert isinstance(expected, np.ndarray)
    assert np.array_equal(latents, expected)


async def test_warm_up_goes_through(engine: DitEngine) -> None:
    serving = Serving(engine)
    async with serving:
        await warm_up(serving.channel)
    assert engine.num_songs == 0


async def test_all_bad_fields_are_named_at_once(engine: DitEngine) -> None:
    setup = DenoiseSetup(
        caption="<|im_start|>",
        lyrics="</think>",
        metadata=SongMetadata(bpm=1000, vocal_language="martian"),
        codes=[64_000],
        options=DiffusionOptions(steps=50, shift=0),
    )
    async with Serving(engine) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, setup)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)  # pyright: ignore[reportArgumentType]
    assert status is not None
    bad = BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert {violation.field for violation in bad.field_violations} == {
        "caption",
        "lyrics",
        "metadata.bpm",
        "metadata.vocal_language",
        "codes[0]",
        "latent_frames",
        "options.steps",
        "options.shift",
    }


async def test_another_models_request_is_refused(engine: DitEngine) -> None:
    async with Serving(engine) as stub:
        await collect(stub, setup_of(model_fingerprint=engine.model_fingerprint))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, setup_of(model_fingerprint="0" * 64))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_full_stage_refuses_and_a_cancelled_call_makes_room() -> None:
    stuck = Stuck()
    serving = Serving(stuck, max_in_flight=1)
    async with serving as stub:
        held = stub.Denoise(only(setup_of()))
        assert (await anext(aiter(held))).progress.step == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub, setup_of())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        held.cancel()
        await asyncio.wait_for(stuck.was_left.wait(), timeout=5)
        assert (stuck.num_songs, serving.admission.in_flight) == (0, 0)
        assert (await anext(aiter(stub.Denoise(only(setup_of()))))).progress.step == 1


async def test_a_deadline_ends_the_song() -> None:
    stuck = Stuck()
    async with Serving(stuck) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.Denoise(only(setup_of()), timeout=0.3):
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(stuck.was_left.wait(), timeout=5)
    assert stuck.num_songs == 0


async def test_a_cancelled_call_frees_its_place_on_the_device(engine: DitEngine) -> None:
    async with Serving(engine) as stub:
        call = stub.Denoise(only(setup_of(options=DiffusionOptions(steps=20), latent_frames=15_000)))
        await anext(aiter(call))
        assert engine.num_songs == 1
        call.cancel()
        # The next song is answered by the same worker, so the cancelled one's steps are over by then.
        await collect(stub, setup_of(options=DiffusionOptions(steps=1), latent_frames=1))
        assert engine.num_songs == 0
