"""A song to be made: what a DenoiseRequest asks for, checked whole."""

import math
from dataclasses import dataclass
from typing import Final

from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest
from soundstage_runtime.score import LATENTS_PER_CODE, MAX_LATENT_FRAMES
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks

DEFAULT_STEPS: Final = 8
DEFAULT_SHIFT: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Song:
    """What to make; None is unknown, `num_frames` counts latent frames, `codes` is empty or at most covers them."""

    caption: str
    lyrics: str
    num_frames: int
    seed: int
    bpm: int | None = None
    key_scale: str | None = None
    time_signature: str | None = None
    language: str = "unknown"
    duration_s: float | None = None
    codes: tuple[int, ...] = ()
    steps: int = DEFAULT_STEPS
    shift: float = DEFAULT_SHIFT


def read_song(request: DenoiseRequest) -> Song:
    """Read a request; raises InvalidRequestError naming every bad field."""
    checks = Checks()
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    metadata = checks.metadata(request.metadata)
    checks.codes("codes", request.codes)
    checks.number("latent_frames", request.latent_frames, 1, MAX_LATENT_FRAMES)
    checks.diffusion(request.options, field="options")
    checks.finish()
    options = request.options
    return Song(
        caption=request.caption,
        lyrics=request.lyrics,
        num_frames=request.latent_frames,
        seed=request.seed,
        bpm=metadata.bpm if metadata.HasField("bpm") else None,
        key_scale=metadata.key_scale if metadata.HasField("key_scale") else None,
        time_signature=metadata.time_signature if metadata.HasField("time_signature") else None,
        language=metadata.vocal_language if metadata.HasField("vocal_language") else "unknown",
        duration_s=metadata.duration_s if metadata.HasField("duration_s") else None,
        codes=tuple(request.codes[: math.ceil(request.latent_frames / LATENTS_PER_CODE)]),
        steps=options.steps if options.HasField("steps") else DEFAULT_STEPS,
        shift=options.shift if options.HasField("shift") else DEFAULT_SHIFT,
    )
