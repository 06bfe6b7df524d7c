"""The contract over real gRPC, with a codec that needs no weights."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray

from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeSetup, EncodeRequest, EncodeSetup
from soundstage.stage.v1.vae_service_pb2_grpc import VaeServiceStub
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32, AudioChunk
from soundstage.type.v1.tensor_pb2 import DATA_TYPE_FLOAT32, LatentChunk, Tensor
from soundstage_runtime.admission import Admission
from soundstage_runtime.tensors import to_proto

Floats = NDArray[np.float32]
Serving = Callable[..., AbstractAsyncContextManager[grpc.aio.Channel]]


class Silence:
    """A codec of zeros, that answers every run as it comes."""

    fingerprint = "f" * 64

    async def decode(self, latents: AsyncIterator[Floats], num_frames: int, wanted: range) -> AsyncGenerator[Floats]:
        written = 0
        while written < num_frames:
            run = await anext(latents)
            span = range(written * 1920, (written + len(run)) * 1920)
            written += len(run)
            yield np.zeros((len([frame for frame in span if frame in wanted]), 2), np.float32)

    async def encode(self, audio: AsyncIterator[Floats], num_samples: int, seed: int | None) -> AsyncGenerator[Floats]:
        heard = 0
        while heard < num_samples:
            heard += len(await anext(audio))
        yield np.zeros((num_samples // 1920, 64), np.float32)


def decode_setup(latent_frames: int = 10, **fields: object) -> DecodeRequest:
    return DecodeRequest(setup=DecodeSetup(latent_frames=latent_frames, **fields))  # pyright: ignore[reportArgumentType]


def latents(first_frame: int, num_frames: int, channels: int = 64, value: float = 0.0) -> DecodeRequest:
    tensor = to_proto(np.full((num_frames, channels), value, np.float32))
    return DecodeRequest(latents=LatentChunk(first_frame=first_frame, tensor=tensor))


def raw_latents(tensor: Tensor) -> DecodeRequest:
    return DecodeRequest(latents=LatentChunk(tensor=tensor))


def encode_setup(frame_count: int = 4000, **fields: object) -> EncodeRequest:
    return EncodeRequest(setup=EncodeSetup(frame_count=frame_count, sample_format=SAMPLE_FORMAT_F32, **fields))  # pyright: ignore[reportArgumentType]


def audio(first_frame: int, frame_count: int, data: bytes | None = None) -> EncodeRequest:
    data = bytes(frame_count * 8) if data is None else data
    return EncodeRequest(audio=AudioChunk(first_frame=first_frame, frame_count=frame_count, data=data))


def details(error: grpc.aio.AioRpcError) -> tuple[ErrorInfo, BadRequest, RetryInfo]:
    status = Status()
    packed = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status.ParseFromString(packed if isinstance(packed, bytes) else packed.encode())
    info, bad, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in status.details:
        assert detail.Unpack(info) or detail.Unpack(bad) or detail.Unpack(retry)
    return info, bad, retry


def told(error: grpc.aio.AioRpcError) -> list[str]:
    return [f"{v.field} {v.description}" for v in details(error)[1].field_violations]


async def fail(call: AsyncIterable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


BAD_DECODES: list[tuple[str, list[DecodeRequest], list[str]]] = [
    ("no message", [], ["setup is missing: there is no message; the first message must carry it"]),
    (
        "no setup",
        [latents(0, 10)],
        ["setup is missing: the first message carries latents; the first message must carry it"],
    ),
    (
        "empty",
        [DecodeRequest()],
        ["setup is missing: the first message carries nothing; the first message must carry it"],
    ),
    (
        "second setup",
        [decode_setup(), latents(0, 4), decode_setup()],
        ["latents is missing: message 3 carries setup, which only the first message may; every later one carries it"],
    ),
    (
        "empty later",
        [decode_setup(), DecodeRequest()],
        ["latents is missing: message 2 carries nothing; every later one carries it"],
    ),
    ("no frames", [decode_setup(0)], ["setup.latent_frames is 0; must be 1 to 15000"]),
    (
        "all of the setup",
        [decode_setup(15_001, sample_format=9)],
        [
            "setup.latent_frames is 15001; must be 1 to 15000",
            "setup.sample_format is 9; must be one of SAMPLE_FORMAT_UNSPECIFIED, SAMPLE_FORMAT_S16, SAMPLE_FORMAT_F32, "
            "SAMPLE_FORMAT_S24",
        ],
    ),
    ("first frame", [decode_setup(first_frame=19_200)], ["setup.first_frame is 19200; must be 0 to 19199"]),
    ("no audio", [decode_setup(frame_count=0)], ["setup.frame_count is 0; must be 1 to 19200"]),
    (
        "beyond the end",
        [decode_setup(first_frame=19_000, frame_count=201)],
        ["setup.frame_count is 201; must be 1 to 200"],
    ),
    (
        "all of the range",
        [decode_setup(first_frame=2**63, frame_count=2**64 - 1)],
        [
            f"setup.first_frame is {2**63}; must be 0 to 19199",
            f"setup.frame_count is {2**64 - 1}; must be 1 to 1",
        ],
    ),
    (
        "latents after the range",
        [decode_setup(frame_count=1), latents(0, 9)],
        ["latents ended after frame 9; setup.latent_frames is 10"],
    ),
    (
        "gap",
        [decode_setup(), latents(0, 4), latents(5, 5)],
        ["latents.first_frame is 5; must be 4, where the last chunk ended"],
    ),
    (
        "overlap",
        [decode_setup(), latents(0, 4), latents(3, 7)],
        ["latents.first_frame is 3; must be 4, where the last chunk ended"],
    ),
    ("too many", [decode_setup(), latents(0, 11)], ["latents reaches frame 11; setup.latent_frames is 10"]),
    (
        "one more",
        [decode_setup(), latents(0, 10), latents(10, 1)],
        ["latents reaches frame 11; setup.latent_frames is 10"],
    ),
    ("too few", [decode_setup(), latents(0, 9)], ["latents ended after frame 9; setup.latent_frames is 10"]),
    ("none", [decode_setup()], ["latents ended after frame 0; setup.latent_frames is 10"]),
    (
        "channels",
        [decode_setup(), latents(0, 10, channels=63)],
        ["latents.tensor.shape is [10, 63]; must be [1 or more, 64]"],
    ),
    (
        "place and shape",
        [decode_setup(), latents(2, 8, channels=2)],
        [
            "latents.first_frame is 2; must be 0, where the last chunk ended",
            "latents.tensor.shape is [8, 2]; must be [1 or more, 64]",
        ],
    ),
    (
        "dtype",
        [decode_setup(), raw_latents(Tensor(shape=[10, 64], data=bytes(2560)))],
        ["latents.tensor.data_type is 0; must be one of DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT16, DATA_TYPE_BFLOAT16"],
    ),
    (
        "truncated",
        [decode_setup(), raw_latents(Tensor(data_type=DATA_TYPE_FLOAT32, shape=[10, 64], data=bytes(2559)))],
        ["latents.tensor.data holds 2559 bytes; [10, 64] takes 2560"],
    ),
    (
        "nan",
        [decode_setup(), latents(0, 10, value=np.nan)],
        ["latents.tensor.data holds NaN or infinity; every element must be finite"],
    ),
]

BAD_ENCODES: list[tuple[str, list[EncodeRequest], list[str]]] = [
    ("no message", [], ["setup is missing: there is no message; the first message must carry it"]),
    (
        "no setup",
        [audio(0, 4000)],
        ["setup is missing: the first message carries audio; the first message must carry it"],
    ),
    ("short", [encode_setup(1919)], ["setup.frame_count is 1919; must be 1920 to 28800000"]),
    ("long", [encode_setup(28_800_001)], ["setup.frame_count is 28800001; must be 1920 to 28800000"]),
    (
        "second setup",
        [encode_setup(), encode_setup()],
        ["audio is missing: message 2 carries setup, which only the first message may; every later one carries it"],
    ),
    (
        "gap",
        [encode_setup(), audio(0, 9), audio(10, 9)],
        ["audio.first_frame is 10; must be 9, where the last chunk ended"],
    ),
    ("too many", [encode_setup(), audio(0, 4001)], ["audio reaches frame 4001; setup.frame_count is 4000"]),
    ("too few", [encode_setup(), audio(0, 3999)], ["audio ended after frame 3999; setup.frame_count is 4000"]),
    ("odd bytes", [encode_setup(), audio(0, 2, bytes(15))], ["audio.data holds 15 bytes; 2 stereo frames take 16"]),
    ("empty", [encode_setup(), audio(0, 0)], ["audio.frame_count is 0; must be at least 1"]),
    (
        "nan",
        [encode_setup(), audio(0, 1, np.array([0, np.inf], "<f4").tobytes())],
        ["audio.data holds NaN or infinity; every sample must be finite"],
    ),
]


@pytest.mark.parametrize(("requests", "violations"), [pytest.param(*rest, id=name) for name, *rest in BAD_DECODES])
async def test_a_malformed_decode_is_refused_by_field(
    serving: Serving, requests: list[DecodeRequest], violations: list[str]
) -> None:
    async with serving(Silence()) as channel:
        stub = VaeServiceStub(channel)
        error = await fail(stub.Decode(iter(requests)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert told(error) == violations


@pytest.mark.parametrize(("requests", "violations"), [pytest.param(*rest, id=name) for name, *rest in BAD_ENCODES])
async def test_a_malformed_encode_is_refused_by_field(
    serving: Serving, requests: list[EncodeRequest], violations: list[str]
) -> None:
    async with serving(Silence()) as channel:
        stub = VaeServiceStub(channel)
        error = await fail(stub.Encode(iter(requests)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert told(error) == violations


async def test_another_models_latents_are_refused(serving: Serving) -> None:
    async with serving(Silence()) as channel:
        stub = VaeServiceStub(channel)
        calls = [
            stub.Decode(iter([decode_setup(model_fingerprint="0" * 64)])),
            stub.Encode(iter([encode_setup(model_fingerprint="0" * 64)])),
        ]
        for call in calls:
            error = await fail(call)
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert details(error)[0].metadata["loaded"] == Silence.fingerprint


async def test_the_loaded_models_fingerprint_is_taken(serving: Serving) -> None:
    async with serving(Silence()) as channel:
        stub = VaeServiceStub(channel)
        call = stub.Decode(iter([decode_setup(1, model_fingerprint=Silence.fingerprint), latents(0, 1)]))
        assert [response.audio.frame_count async for response in call] == [1920]


async def test_audio_is_answered_before_the_last_latents_have_come(serving: Serving) -> None:
    async with serving(Silence()) as channel:
        stub = VaeServiceStub(channel)
        call = stub.Decode()
        await call.write(decode_setup(2))
        await call.write(latents(0, 1))
        response = await anext(aiter(call))
        assert response.audio.frame_count == 1920
        await call.write(latents(1, 1))
        await call.done_writing()
        assert [response.audio.first_frame async for response in call] == [1920]


async def test_one_call_too_many_is_refused_and_may_come_back_later(serving: Serving) -> None:
    admission = Admission("VAE calls", limit=1)
    async with serving(Silence(), admission) as channel:
        stub = VaeServiceStub(channel)
        holder = stub.Decode()
        await holder.write(decode_setup(2))
        await holder.write(latents(0, 1))
        await anext(aiter(holder))
        error = await fail(stub.Encode(iter([encode_setup()])))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error)[2].retry_delay.ToMilliseconds() > 0
        await holder.write(latents(1, 1))
        await holder.done_writing()
        assert [response.audio.frame_count async for response in holder] == [1920]
        again = stub.Encode(iter([encode_setup(), audio(0, 4000)]))
        assert [list(response.latents.tensor.shape) async for response in again] == [[2, 64]]
    assert admission.in_flight == 0


async def test_a_client_that_never_sends_is_let_go_at_its_deadline(serving: Serving) -> None:
    admission = Admission("VAE calls", limit=1)
    async with serving(Silence(), admission) as channel:
        stub = VaeServiceStub(channel)
        call = stub.Decode(timeout=0.3)
        await call.write(decode_setup(2))
        assert (await fail(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert admission.in_flight == 0


@pytest.mark.parametrize("messages", [0, 1, 2])
async def test_a_client_without_a_deadline_that_stops_sending_is_let_go(serving: Serving, messages: int) -> None:
    admission = Admission("VAE calls", limit=1)
    async with serving(Silence(), admission, idle_timeout_s=0.2) as channel:
        call = VaeServiceStub(channel).Decode()
        for message in [decode_setup(2), latents(0, 1)][:messages]:
            await call.write(message)
        error = await fail(call)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details(error)[0].reason == "CALLER_STALLED"
    assert admission.in_flight == 0
