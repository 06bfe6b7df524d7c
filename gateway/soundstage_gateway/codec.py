"""The codec as the gateway asks it: audio to latents, and any range of latents to audio."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from soundstage.music.v1.song_service_pb2 import STAGE_VAE
from soundstage.stage.v1.vae_service_pb2 import (
    DecodeRequest,
    DecodeResponse,
    DecodeSetup,
    EncodeRequest,
    EncodeResponse,
    EncodeSetup,
)
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32
from soundstage.type.v1.tensor_pb2 import DATA_TYPE_FLOAT32, LatentChunk, Tensor
from soundstage_gateway.audio_file import Samples
from soundstage_gateway.stages import Stages, ask
from soundstage_runtime.pcm import audio_chunks, from_bytes
from soundstage_runtime.score import LATENT_CHANNELS
from soundstage_runtime.tensors import from_proto, latent_chunks


async def encode(
    stages: Stages, pieces: Iterable[Samples], num_frames: int, *, model_fingerprint: str
) -> list[LatentChunk]:
    """Await the latents of audio that comes in pieces [n, 2], `num_frames` in all; raises ServiceError."""

    async def audio() -> AsyncGenerator[EncodeRequest, None]:
        yield EncodeRequest(
            setup=EncodeSetup(
                frame_count=num_frames, sample_format=SAMPLE_FORMAT_F32, model_fingerprint=model_fingerprint
            )
        )
        first_frame = 0
        for piece in pieces:
            for chunk, _ in audio_chunks(piece, first_frame=first_frame, sample_format=SAMPLE_FORMAT_F32):
                yield EncodeRequest(audio=chunk)
            first_frame += len(piece)

    async with aclosing(ask(STAGE_VAE, stages.vae.Encode, audio(), EncodeResponse)) as responses:
        return [response.latents async for response in responses]


async def decode(
    stages: Stages, latents: Tensor, model_fingerprint: str, start: int, stop: int
) -> AsyncGenerator[Samples, None]:
    """Yield frames [start, stop) of latents [frames, 64] as samples [n, 2]; raises ServiceError."""

    async def requests() -> AsyncGenerator[DecodeRequest, None]:
        setup = DecodeSetup(
            latent_frames=latents.shape[0],
            sample_format=SAMPLE_FORMAT_F32,
            model_fingerprint=model_fingerprint,
            first_frame=start,
            frame_count=stop - start,
        )
        yield DecodeRequest(setup=setup)
        rows = from_proto(latents, "latents", shape=(None, LATENT_CHANNELS))
        for chunk in latent_chunks(rows, DATA_TYPE_FLOAT32):
            yield DecodeRequest(latents=chunk)

    async with aclosing(ask(STAGE_VAE, stages.vae.Decode, requests(), DecodeResponse)) as responses:
        async for response in responses:
            yield from_bytes(response.audio.data, SAMPLE_FORMAT_F32)
