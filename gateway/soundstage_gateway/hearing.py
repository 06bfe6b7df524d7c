"""What the stages hear of a source and of references: latents."""

import math
import random
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Final

import numpy as np

from soundstage.music.v1.song_service_pb2 import STAGE_VAE
from soundstage.stage.v1.vae_service_pb2 import EncodeRequest, EncodeResponse, EncodeSetup
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32
from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_gateway.audio_file import Samples
from soundstage_gateway.sound import OpenSound
from soundstage_gateway.stages import Stages, ask
from soundstage_runtime.pcm import audio_chunks
from soundstage_runtime.score import REFERENCE_LATENTS, SAMPLES_PER_LATENT

_WINDOWS: Final = 3
REFERENCE_FRAMES: Final = REFERENCE_LATENTS * SAMPLES_PER_LATENT
_WINDOW_FRAMES: Final = REFERENCE_FRAMES // _WINDOWS


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


async def reference_windows(sound: OpenSound, *, seed: int) -> AsyncGenerator[Samples, None]:
    """Yield what is heard of a reference [n, 2], repeated to at least 30 s: 10 s out of each of its thirds.

    Nothing else of it is read, unless it is shorter than that. Raises ServiceError.
    """
    draw = random.Random(seed)
    third = math.ceil(REFERENCE_FRAMES / sound.num_frames) * sound.num_frames // _WINDOWS
    rooms = [int(draw.random() * (third - _WINDOW_FRAMES + 1)) for _ in range(_WINDOWS)]
    starts = [index * third + room for index, room in enumerate(rooms)]
    if sound.num_frames < REFERENCE_FRAMES:
        async with aclosing(sound.read(0, sound.num_frames)) as pieces:
            samples = np.concatenate([piece async for piece in pieces])
        for start in starts:
            yield samples[np.arange(start, start + _WINDOW_FRAMES) % sound.num_frames]
        return
    for start in starts:
        async with aclosing(sound.read(start, start + _WINDOW_FRAMES)) as pieces:
            async for piece in pieces:
                yield piece


def shift(chunks: Iterable[LatentChunk], frames: int) -> Iterable[LatentChunk]:
    """Yield chunks as they are, `frames` later in their stream."""
    for chunk in chunks:
        yield LatentChunk(first_frame=chunk.first_frame + frames, tensor=chunk.tensor)
