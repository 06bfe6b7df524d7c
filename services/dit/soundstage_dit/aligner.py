"""Lyrics aligned with the song that was made of them: a look at the transformer, and what the arrays tell."""

import asyncio
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from soundstage_dit.alignment import (
    Alignment,
    Heads,
    Matrix,
    combine,
    find_heads,
    find_sung,
    score_attention,
    sharpen,
    time_lines,
    warp,
)
from soundstage_dit.conditioning import MAX_LYRIC_TOKENS, LyricTokens
from soundstage_dit.memory import estimate_bytes
from soundstage_dit.sampler import draw_noise, noised
from soundstage_dit.scheduler import count_tokens
from soundstage_dit.song import Latents, Song
from soundstage_dit.trajectory import Conditions
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.score import SAMPLE_RATE_HZ, SAMPLES_PER_LATENT

_SEED: Final = 42


class AlignError(ServiceError):
    """Attention to the lyrics is not finite."""

    reason = "ALIGN_FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Where heads attend to lyrics, a matrix [tokens, frames] each."""

    lyrics: LyricTokens
    attention: tuple[Matrix, ...]
    frame_s: float


def look_bytes(song: Song, model: LoadedModel) -> int:
    """Estimate, from above, what a look takes beside the model: conditions, and what a layer's heads give to words.

    Raises UncalibratedError.
    """
    words = min(MAX_LYRIC_TOKENS, len(song.lyrics.encode()))
    heads = max(map(len, _heads_of(model).values()))
    return estimate_bytes(song, model) + 2 * heads * count_tokens(song.num_frames) * words * 4


def look(song: Song, latents: Latents, conditions: Conditions, model: LoadedModel, *, time: float) -> Look:
    """See where the transformer attends to the lyrics of a song that was made, [frames, channels], at a time.

    At 1 it is shown noise alone. Raises UncalibratedError and AlignError.
    """
    diffusion = song.diffusion
    made = (torch.from_numpy(latents) - diffusion.latent_shift) / diffusion.latent_rescale
    noisy = noised(made, draw_noise(_SEED, *made.shape), time)
    lyrics = model.conditioner.lyric_tokens(song)
    attention: list[Matrix] = [
        weights.numpy()
        for weights in model.dit.attention(
            noisy.to(model.device),
            time,
            conditions.context,
            conditions.memory,
            conditions.adaptations,
            heads=_heads_of(model),
            conditions=lyrics.places,
        )
    ]
    if not all(np.isfinite(matrix).all() for matrix in attention):
        raise AlignError("the model's attention is not finite; float32 or bfloat16 may help where float16 was used")
    duration_s = len(latents) * SAMPLES_PER_LATENT / SAMPLE_RATE_HZ
    return Look(lyrics=lyrics, attention=tuple(attention), frame_s=duration_s / attention[0].shape[1])


async def align(look: Look) -> Alignment:
    """Find the path that lyrics take through a song.

    Cancelling acts between the parts of it, none of which keeps the event loop from its work.
    """
    if not look.lyrics.texts:
        return Alignment()
    sharpened = [await asyncio.to_thread(sharpen, matrix) for matrix in look.attention]
    path = await asyncio.to_thread(lambda: warp(-combine(sharpened)))
    return Alignment(lines=time_lines(look.lyrics.lines, path, look.frame_s), score=await score(look))


async def score(look: Look) -> float:
    """Say how well what was looked at follows the lyrics, 0 to 1."""
    if not look.lyrics.texts:
        return 0.0
    return await asyncio.to_thread(score_attention, look.attention, find_sung(look.lyrics.texts))


def _heads_of(model: LoadedModel) -> Heads:
    stack = model.dit.shape.stack
    return find_heads(len(stack.windows), stack.heads, model.lyric_heads)
