"""Latents into audio codes, piece by piece: short beside a step of diffusion."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from soundstage_dit.song import Latents
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.score import LATENTS_PER_CODE

_FRAMES_AT_ONCE: Final = 64 * LATENTS_PER_CODE


class TokenizeError(ServiceError):
    """Latents led to numbers that are not finite."""

    reason = "TOKENIZE_FAILED"


async def cut(latents: AsyncIterator[Latents]) -> AsyncGenerator[Latents]:
    """Cut latents [frames, channels] that come in runs into pieces for `encode`.

    A song is cut by its own length, not by the runs it comes in, so its codes are always the same.
    """
    held: Latents | None = None
    async for run in latents:
        held = run if held is None else np.concatenate([held, run])
        while len(held) >= _FRAMES_AT_ONCE:
            yield held[:_FRAMES_AT_ONCE]
            held = held[_FRAMES_AT_ONCE:]
    if held is not None and len(held):
        yield held


def encode(model: LoadedModel, latents: Latents) -> NDArray[np.int64]:
    """Return the codes [codes] of a piece [frames, channels]; raises TokenizeError."""
    codes: NDArray[np.int64] = (
        model.code_encoder(torch.from_numpy(latents).to(model.device), model.silence).cpu().numpy()
    )
    if (codes < 0).any():
        raise TokenizeError("the model's codes are not finite: the latents are too large, or float16 is too narrow")
    return codes
