"""Tokenize: the contract over real gRPC, and codes that depend on the latents alone."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import cast

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from soundstage.stage.v1.dit_service_pb2 import (
    DenoiseRequest,
    DenoiseResponse,
    DenoiseSetup,
    TokenizeRequest,
    TokenizeSetup,
)
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.type.v1.tensor_pb2 import (
    DATA_TYPE_BFLOAT16,
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    LatentChunk,
)
from soundstage.type.v1.tensor_pb2 import Tensor as WireTensor
from soundstage_dit.adapters import Loan
from soundstage_dit.alignment import Alignment
from soundstage_dit.engine import DitEngine
from soundstage_dit.model.codes import CodeEncoder
from soundstage_dit.schedule import schedule
from soundstage_dit.song import Diffusion, Song
from soundstage_dit.tokenizing import TokenizeError
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import read_details
from soundstage_runtime.tensors import latent_chunks, to_proto
from soundstage_runtime.worker import Worker

from .conftest import Serving

Floats = NDArray[np.float32]


class Counter:
    """Answers a code for every run of latents, which is how many frames it has."""

    async def denoise(self, song: Song, adapters: Loan) -> AsyncGenerator[int | Floats]:
        yield np.zeros((song.num_frames, 64), np.float32)

    async def tokenize(self, latents: AsyncIterator[Floats], model: str) -> AsyncGenerator[NDArray[np.int64]]:
        async for run in latents:
            yield np.array([len(run)])

    async def align(self, song: Song, latents: Floats, adapters: Loan) -> Alignment:
        return Alignment(lines=(), score=0.0)


class Gated:
    """A code encoder that waits for leave before every piece, and counts those that have begun."""

    def __init__(self, encoder: CodeEncoder) -> None:
        self.gate = threading.Semaphore(0)
        self.begun = 0
        self._encoder = encoder

    def __call__(self, latents: Tensor, silence: Tensor) -> Tensor:
        self.begun += 1
        self.gate.acquire()
        return self._encoder(latents, silence)


@pytest.fixture
async def gated(model: LoadedModel) -> AsyncIterator[tuple[Gated, DitEngine]]:
    """An engine whose pieces a test lets through."""
    encoder = Gated(model.code_encoder)
    engine = DitEngine([replace(model, code_encoder=cast(CodeEncoder, encoder))], Worker("dit"), max_batch=4)
    yield encoder, engine
    encoder.gate.release(100)
    engine.close()


def draw(frames: int) -> Floats:
    """Latents [frames, 64]."""
    return np.random.default_rng(0).standard_normal((frames, 64), np.float32)


def setup(latent_frames: int = 10, **fields: object) -> TokenizeRequest:
    return TokenizeRequest(setup=TokenizeSetup(latent_frames=latent_frames, **fields))  # pyright: ignore[reportArgumentType]


def run(first_frame: int, num_frames: int, channels: int = 64, value: float = 0.0) -> TokenizeRequest:
    tensor = to_proto(np.full((num_frames, channels), value, np.float32))
    return TokenizeRequest(latents=LatentChunk(first_frame=first_frame, tensor=tensor))


def raw(tensor: WireTensor) -> TokenizeRequest:
    return TokenizeRequest(latents=LatentChunk(tensor=tensor))


def song(latents: Floats) -> list[TokenizeRequest]:
    chunks = latent_chunks(latents, DATA_TYPE_FLOAT32)
    return [setup(len(latents)), *(TokenizeRequest(latents=chunk) for chunk in chunks)]


async def cut(latents: Floats, cuts: list[int]) -> AsyncIterator[Floats]:
    """Latents in runs that end at the cuts."""
    for piece in np.split(latents, sorted(cuts)):
        if len(piece):
            yield piece


async def tokenize(engine: DitEngine, latents: Floats, cuts: list[int] | None = None) -> list[int]:
    """All codes of latents, sent in runs that end at the cuts."""
    return [code async for codes in engine.tokenize(cut(latents, cuts or [])) for code in codes.tolist()]


async def read(call: "grpc.aio.StreamStreamCall[DenoiseRequest, DenoiseResponse]") -> list[DenoiseResponse]:
    """All responses of a call."""
    return [response async for response in call]


async def fail(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110  the state changes on another thread, or behind the wire
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("frames", [1, 4, 5, 319, 320, 321, 1603])
async def test_a_song_comes_back_in_codes(model: LoadedModel, engine: DitEngine, frames: int) -> None:
    latents = draw(frames)
    async with Serving(engine) as stub:
        response = await stub.Tokenize(iter(song(latents)))
    with torch.inference_mode():
        expected = model.code_encoder(torch.from_numpy(latents), model.silence)
    assert list(response.codes) == expected.tolist()


@pytest.mark.parametrize("data_type", [DATA_TYPE_FLOAT16, DATA_TYPE_BFLOAT16])
async def test_latents_may_come_in_half_precision(engine: DitEngine, data_type: int) -> None:
    # Values that every type holds, so that the codes are the same.
    latents = (np.round(draw(40) * 8) / 8).astype(np.float32)
    chunk = LatentChunk(tensor=to_proto(latents, data_type))  # pyright: ignore[reportArgumentType]
    async with Serving(engine) as stub:
        response = await stub.Tokenize(iter([setup(40), TokenizeRequest(latents=chunk)]))
    assert list(response.codes) == await tokenize(engine, latents)


@settings(max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 1000), cuts=st.lists(st.integers(1, 999), max_size=12))
def test_codes_do_not_depend_on_the_runs_they_come_in(model: LoadedModel, frames: int, cuts: list[int]) -> None:
    async def compare() -> None:
        engine = DitEngine([model], Worker("dit"), max_batch=4)
        latents = draw(frames)
        assert await tokenize(engine, latents, cuts) == await tokenize(engine, latents)
        engine.close()

    asyncio.run(compare())


async def test_codes_do_not_depend_on_what_else_is_in_flight(engine: DitEngine) -> None:
    async def denoise(seed: int) -> Floats:
        wanted = Song(
            caption="a", lyrics="b", num_frames=90, seed=seed, diffusion=Diffusion(times=tuple(schedule(6, 3.0)))
        )
        *_, latents = [event async for event in engine.denoise(wanted)]
        assert isinstance(latents, np.ndarray)
        return latents

    songs = [draw(frames) for frames in (1000, 700, 333)]
    alone = [await tokenize(engine, latents) for latents in songs]
    denoised = await denoise(1)
    *together, beside = await asyncio.gather(*(tokenize(engine, latents) for latents in songs), denoise(1))
    assert together == alone
    assert np.array_equal(cast(Floats, beside), denoised)


async def test_latents_that_overflow_the_model_are_an_error_and_not_codes(engine: DitEngine) -> None:
    with pytest.raises(TokenizeError, match="not finite"):
        await tokenize(engine, np.full((5, 64), 3e38, np.float32))
    assert len(await tokenize(engine, draw(5))) == 1


BAD: list[tuple[str, list[TokenizeRequest], list[str]]] = [
    ("no message", [], ["setup is missing: there is no message; the first message must carry it"]),
    (
        "no setup",
        [run(0, 10)],
        ["setup is missing: the first message carries latents; the first message must carry it"],
    ),
    (
        "empty",
        [TokenizeRequest()],
        ["setup is missing: the first message carries nothing; the first message must carry it"],
    ),
    (
        "second setup",
        [setup(), run(0, 10), setup()],
        ["latents is missing: message 3 carries setup, which only the first message may; every later one carries it"],
    ),
    ("no frames", [setup(0)], ["setup.latent_frames is 0; must be 1 to 15000"]),
    ("too long", [setup(15_001)], ["setup.latent_frames is 15001; must be 1 to 15000"]),
    (
        "gap",
        [setup(), run(0, 4), run(5, 5)],
        ["latents.first_frame is 5; must be 4, where the last chunk ended"],
    ),
    (
        "order",
        [setup(), run(5, 5), run(0, 5)],
        ["latents.first_frame is 5; must be 0, where the last chunk ended"],
    ),
    ("too many", [setup(), run(0, 11)], ["latents reaches frame 11; setup.latent_frames is 10"]),
    ("one more", [setup(), run(0, 10), run(10, 1)], ["latents reaches frame 11; setup.latent_frames is 10"]),
    ("too few", [setup(), run(0, 9)], ["latents ended after frame 9; setup.latent_frames is 10"]),
    ("none", [setup()], ["latents ended after frame 0; setup.latent_frames is 10"]),
    (
        "place and shape",
        [setup(), run(2, 8, channels=2)],
        [
            "latents.first_frame is 2; must be 0, where the last chunk ended",
            "latents.tensor.shape is [8, 2]; must be [1 or more, 64]",
        ],
    ),
    (
        "dtype",
        [setup(), raw(WireTensor(shape=[10, 64], data=bytes(2560)))],
        ["latents.tensor.data_type is 0; must be one of DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT16, DATA_TYPE_BFLOAT16"],
    ),
    (
        "truncated",
        [setup(), raw(WireTensor(data_type=DATA_TYPE_FLOAT32, shape=[10, 64], data=bytes(2559)))],
        ["latents.tensor.data holds 2559 bytes; [10, 64] takes 2560"],
    ),
    (
        "nan",
        [setup(), run(0, 10, value=np.nan)],
        ["latents.tensor.data holds NaN or infinity; every element must be finite"],
    ),
]


@pytest.mark.parametrize(("requests", "violations"), [pytest.param(*rest, id=name) for name, *rest in BAD])
async def test_a_malformed_stream_is_refused_by_field(requests: list[TokenizeRequest], violations: list[str]) -> None:
    serving = Serving(Counter())
    async with serving as stub:
        error = await fail(stub.Tokenize(iter(requests)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [f"{v.field} {v.description}" for v in read_details(error).violations] == violations
    assert serving.admission.in_flight == 0


async def test_another_models_latents_are_refused() -> None:
    served = "f" * 64
    async with Serving(Counter(), models=[StageModel(model_fingerprint=served)]) as stub:
        taken = await stub.Tokenize(iter([setup(model_fingerprint=served), run(0, 3), run(3, 7)]))
        assert list(taken.codes) == [3, 7]
        error = await fail(stub.Tokenize(iter([setup(model_fingerprint="0" * 64)])))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert read_details(error).metadata["loaded"] == served


async def test_denoise_and_tokenize_share_their_places() -> None:
    serving = Serving(Counter(), max_in_flight=1)
    async with serving as stub:
        holder = stub.Tokenize()
        await holder.write(setup(2))
        await until(lambda: serving.admission.in_flight == 1)
        denoising = read(stub.Denoise(iter([DenoiseRequest(setup=DenoiseSetup(caption="a", latent_frames=5))])))
        for refused in (stub.Tokenize(iter([setup()])), denoising):
            error = await fail(refused)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (read_details(error).retry_after_s or 0) > 0
        await holder.write(run(0, 2))
        await holder.done_writing()
        assert list((await holder).codes) == [2]
        assert list((await stub.Tokenize(iter([setup(), run(0, 10)]))).codes) == [10]
    assert serving.admission.in_flight == 0


async def test_a_caller_that_never_sends_is_let_go_at_its_deadline() -> None:
    serving = Serving(Counter())
    async with serving as stub:
        call = stub.Tokenize(timeout=0.3)
        await call.write(setup(2))
        assert (await fail(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: serving.admission.in_flight == 0)


@pytest.mark.parametrize("messages", [0, 1, 2])
async def test_a_caller_without_a_deadline_that_stops_sending_is_let_go(messages: int) -> None:
    serving = Serving(Counter(), idle_timeout_s=0.2)
    async with serving as stub:
        call = stub.Tokenize()
        for message in [setup(2), run(0, 1)][:messages]:
            await call.write(message)
        error = await fail(call)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert read_details(error).reason == "CALLER_STALLED"
    assert serving.admission.in_flight == 0


async def test_a_cancelled_call_frees_its_place_and_stops_within_a_piece(gated: tuple[Gated, DitEngine]) -> None:
    encoder, engine = gated
    serving = Serving(engine, max_in_flight=1)
    async with serving as stub:
        call = stub.Tokenize(iter(song(draw(3000))))
        await until(lambda: encoder.begun == 1)
        encoder.gate.release()
        await until(lambda: encoder.begun == 2)
        call.cancel()
        await until(lambda: serving.admission.in_flight == 0)
        encoder.gate.release(100)
        # The worker takes work in order: were a third piece waiting, it would come before this song's.
        again = await stub.Tokenize(iter(song(draw(10))))
    assert len(again.codes) == 2
    assert encoder.begun == 3
