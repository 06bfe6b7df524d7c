"""Real weights: what streams out is one and the same song, however it streams in, and diffusers' own."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager

import grpc.aio
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from numpy.typing import NDArray

from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeSetup, EncodeRequest, EncodeSetup
from soundstage.stage.v1.vae_service_pb2_grpc import VaeServiceStub
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32, SAMPLE_FORMAT_S16, AudioChunk, SampleFormat
from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_runtime.pcm import from_bytes, to_bytes
from soundstage_runtime.tensors import from_proto, to_proto
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine

Floats = NDArray[np.float32]
Serving = Callable[..., AbstractAsyncContextManager[grpc.aio.Channel]]

# Float noise between one long pass and tiles on more than one thread; lost context would be a hundred times this.
NOISE = 1e-5
LENGTHS = [1, 2, 8, 9, 10, 17, 55, 110, 218, 511, 512, 513]
RANDOM_LENGTHS = np.random.default_rng(11).integers(1, 300, 3).tolist()


def make_latents(num_frames: int) -> Floats:
    return np.random.default_rng(num_frames).standard_normal((num_frames, 64)).astype(np.float32)


def make_audio(num_samples: int) -> Floats:
    return np.random.default_rng(num_samples).uniform(-0.3, 0.3, (num_samples, 2)).astype(np.float32)


def cut(array: Floats, seed: int) -> Iterator[tuple[int, Floats]]:
    """Cut at random places into (place, piece), in order; some pieces are a single row."""
    rng = np.random.default_rng(seed)
    places = [0, 1, *rng.integers(1, len(array) + 1, size=5).tolist(), len(array)]
    for start, stop in zip(sorted(places), sorted(places)[1:], strict=False):
        if start < stop:
            yield start, array[start:stop]


async def feed(pieces: Sequence[Floats]) -> AsyncIterator[Floats]:
    for piece in pieces:
        yield piece


async def join(pieces: AsyncIterator[Floats]) -> Floats:
    return np.concatenate([piece async for piece in pieces])


def decode(engine: VaeEngine, pieces: Sequence[Floats]) -> AsyncGenerator[Floats]:
    num_frames = sum(map(len, pieces))
    return engine.decode(feed(pieces), num_frames, range(num_frames * 1920))


async def decode_over_grpc(
    channel: grpc.aio.Channel, latents: Floats, sample_format: SampleFormat.ValueType, **span: int
) -> Floats:
    setup = DecodeSetup(latent_frames=len(latents), sample_format=sample_format, **span)  # pyright: ignore[reportArgumentType]
    requests = [DecodeRequest(setup=setup)]
    requests += [
        DecodeRequest(latents=LatentChunk(first_frame=start, tensor=to_proto(piece)))
        for start, piece in cut(latents, seed=len(latents))
    ]
    samples: list[Floats] = []
    heard = setup.first_frame
    async for response in VaeServiceStub(channel).Decode(iter(requests)):
        assert response.audio.first_frame == heard
        assert 1 <= response.audio.frame_count <= 24_000
        heard += response.audio.frame_count
        samples.append(from_bytes(response.audio.data, sample_format))
        # Half a step of S16; F32 is exact.
        assert abs(np.abs(samples[-1]).max() - response.peak) <= 0.5 / 32767 + 1e-7
    return np.concatenate(samples)


async def encode_over_grpc(channel: grpc.aio.Channel, audio: Floats, setup: EncodeSetup) -> Floats:
    setup.frame_count = len(audio)
    requests = [EncodeRequest(setup=setup)]
    for start, piece in cut(audio, seed=len(audio)):
        data = to_bytes(piece, setup.sample_format)
        requests.append(EncodeRequest(audio=AudioChunk(first_frame=start, frame_count=len(piece), data=data)))
    latents: list[Floats] = []
    written = 0
    async for response in VaeServiceStub(channel).Encode(iter(requests)):
        assert response.latents.first_frame == written
        latents.append(from_proto(response.latents.tensor, "latents", shape=(None, 64)))
        assert len(latents[-1]) <= 256
        written += len(latents[-1])
    return np.concatenate(latents)


@pytest.mark.parametrize("num_frames", LENGTHS + RANDOM_LENGTHS)
async def test_a_streamed_song_is_the_song_in_one_piece(
    num_frames: int, engine: VaeEngine, oracle: AutoencoderOobleck, serving: Serving
) -> None:
    latents = make_latents(num_frames)
    in_one_piece = await join(decode(engine, [latents]))
    async with serving(engine) as channel:
        streamed = await decode_over_grpc(channel, latents, SAMPLE_FORMAT_F32)
    assert streamed.shape == (1920 * num_frames, 2)
    assert np.array_equal(streamed, in_one_piece)
    with torch.inference_mode():
        whole = oracle.decoder(torch.tensor(latents.T)[None])[0].T.numpy()
    np.testing.assert_allclose(streamed, whole, rtol=0, atol=NOISE)


@pytest.mark.parametrize("num_threads", [1, 2])
async def test_chunking_leaves_no_trace_on_any_number_of_threads(small_engine: VaeEngine, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        latents = make_latents(55)
        in_one_piece = await join(decode(small_engine, [latents]))
        for seed in range(2):
            pieces = [piece for _, piece in cut(latents, seed)]
            assert np.array_equal(await join(decode(small_engine, pieces)), in_one_piece)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("first_frame", "frame_count"), [(0, 1), (0, 1920), (1919, 2), (70_000, 30_001), (134_399, 1), (44_159, 2)]
)
async def test_a_range_is_cut_from_the_song_to_the_bit(
    first_frame: int, frame_count: int, small_engine: VaeEngine, serving: Serving
) -> None:
    latents = make_latents(70)
    whole = await join(decode(small_engine, [latents]))
    async with serving(small_engine) as channel:
        span = await decode_over_grpc(
            channel, latents, SAMPLE_FORMAT_F32, first_frame=first_frame, frame_count=frame_count
        )
        rest = await decode_over_grpc(channel, latents, SAMPLE_FORMAT_F32, first_frame=first_frame)
    assert np.array_equal(span, whole[first_frame : first_frame + frame_count])
    assert np.array_equal(rest, whole[first_frame:])


async def test_songs_side_by_side_do_not_touch_each_other(small_engine: VaeEngine) -> None:
    first, second = make_latents(70), make_latents(90)
    alone = [await join(decode(small_engine, [song])) for song in (first, second)]
    streams = [decode(small_engine, [song]) for song in (first, second)]
    mixed: list[list[Floats]] = [[], []]
    for turn in range(20):  # more turns than either song has tiles
        piece = await anext(streams[turn % 2], None)
        if piece is not None:
            mixed[turn % 2].append(piece)
    for song, pieces in zip(alone, mixed, strict=True):
        assert len(pieces) > 1
        assert np.array_equal(np.concatenate(pieces), song)


async def test_songs_that_share_a_forward_are_the_songs_alone(codec: Codec, small_engine: VaeEngine) -> None:
    sizes: list[int] = []

    def count(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(arguments[0]))

    songs = [make_latents(num_frames) for num_frames in (70, 90, 60)]
    alone = [await join(decode(small_engine, [song])) for song in songs]
    engine = VaeEngine(codec, Worker("vae"), windows=(32,), batches={32: 4})
    with codec.decoder.register_forward_pre_hook(count):
        together = await asyncio.gather(*(join(decode(engine, [song])) for song in songs))
    engine.close()
    assert max(sizes) == 3
    for one, other in zip(alone, together, strict=True):
        # A batch may take another kernel, which is why a service tries whether it does before it batches.
        np.testing.assert_allclose(one, other, rtol=0, atol=NOISE)


async def test_songs_shorter_than_any_window_that_was_tried_share_no_forward(codec: Codec) -> None:
    sizes: list[int] = []

    def count(_module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(arguments[0]))

    engine = VaeEngine(codec, Worker("vae"), windows=(32,), batches={32: 4})
    with codec.decoder.register_forward_pre_hook(count):
        await asyncio.gather(*(join(decode(engine, [make_latents(20)])) for _ in range(3)))
    engine.close()
    assert sizes == [1, 1, 1]


async def test_decodes_s16_by_default(engine: VaeEngine, serving: Serving) -> None:
    latents = make_latents(12)
    loud = await join(decode(engine, [latents]))
    async with serving(engine) as channel:
        streamed = await decode_over_grpc(channel, latents, SAMPLE_FORMAT_S16)
    assert np.array_equal(to_bytes(streamed, SAMPLE_FORMAT_S16), to_bytes(loud, SAMPLE_FORMAT_S16))


@pytest.mark.parametrize("num_samples", [1920, 1921, 3839, 1920 * 33, 1920 * 40 + 1919])
async def test_encoded_tiles_are_the_whole_encoding(
    num_samples: int, small_engine: VaeEngine, oracle: AutoencoderOobleck, serving: Serving
) -> None:
    audio = make_audio(num_samples)
    async with serving(small_engine) as channel:
        latents = await encode_over_grpc(channel, audio, EncodeSetup(sample_format=SAMPLE_FORMAT_F32))
    with torch.inference_mode():
        whole = oracle.encoder(torch.tensor(audio.T)[None])[0, :64].T.numpy()
    assert latents.shape == (num_samples // 1920, 64)
    np.testing.assert_allclose(latents, whole, rtol=0, atol=NOISE)


async def test_a_seed_draws_the_same_latents_again_and_another_seed_others(
    small_engine: VaeEngine, serving: Serving
) -> None:
    audio = make_audio(1920 * 3)
    async with serving(small_engine) as channel:
        drawn = [await encode_over_grpc(channel, audio, EncodeSetup(seed=seed)) for seed in (7, 7, 8)]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.1


async def test_tiles_share_the_noise_that_one_pass_would_draw(
    small_engine: VaeEngine, oracle: AutoencoderOobleck
) -> None:
    audio = make_audio(1920 * 33)
    drawn = await join(small_engine.encode(feed([audio]), len(audio), 7))
    with torch.inference_mode():
        posterior = oracle.encode(torch.tensor(audio.T)[None]).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        whole = posterior.sample(generator=torch.Generator().manual_seed(7))[0].T.numpy()
    np.testing.assert_allclose(drawn, whole, rtol=0, atol=NOISE)


async def test_seed_zero_is_a_seed(small_engine: VaeEngine, serving: Serving) -> None:
    audio = make_audio(1920 * 2)
    async with serving(small_engine) as channel:
        mean = await encode_over_grpc(channel, audio, EncodeSetup())
        drawn = await encode_over_grpc(channel, audio, EncodeSetup(seed=0))
    assert np.abs(mean - drawn).max() > 0.1
