"""What is heard of references, and where their latents stand."""

import math
import random
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Final

import numpy as np

from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_gateway.audio_file import Samples
from soundstage_gateway.sound import OpenSound
from soundstage_runtime.score import REFERENCE_LATENTS, SAMPLES_PER_LATENT

_WINDOWS: Final = 3
REFERENCE_FRAMES: Final = REFERENCE_LATENTS * SAMPLES_PER_LATENT
_WINDOW_FRAMES: Final = REFERENCE_FRAMES // _WINDOWS


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
