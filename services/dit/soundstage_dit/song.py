"""A song to be made: what a DenoiseRequest asks for, checked whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import (
    BPM_RANGE,
    DURATION_RANGE_S,
    KEY_SCALES,
    LANGUAGES,
    LATENTS_PER_CODE,
    MAX_LATENT_FRAMES,
    NUM_CODES,
    TIME_SIGNATURES,
)
from soundstage_runtime.text import control_tokens

STEPS_RANGE: Final = (1, 20)
SHIFT_RANGE: Final = (1.0, 5.0)
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
    found = [
        *_check_text("caption", request.caption),
        *_check_text("lyrics", request.lyrics),
        *_check_metadata(request.metadata),
        *_check_codes(request.codes),
        *_check_range("latent_frames", request.latent_frames, (1, MAX_LATENT_FRAMES)),
        *_check_options(request.options),
    ]
    if found:
        raise InvalidRequestError(found)
    metadata, options = request.metadata, request.options
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


def _check_text(field: str, text: str) -> list[Violation]:
    found = control_tokens(text)
    return [_violation(field, f"holds the control token {found[0]}; plain text is wanted")] if found else []


def _check_metadata(metadata: SongMetadata) -> list[Violation]:
    found: list[Violation] = []
    if metadata.HasField("bpm"):
        found += _check_range("metadata.bpm", metadata.bpm, BPM_RANGE)
    if metadata.HasField("duration_s"):
        found += _check_range("metadata.duration_s", metadata.duration_s, DURATION_RANGE_S)
    if metadata.HasField("key_scale"):
        found += _check_word("metadata.key_scale", metadata.key_scale, KEY_SCALES)
    if metadata.HasField("time_signature"):
        found += _check_word("metadata.time_signature", metadata.time_signature, TIME_SIGNATURES)
    if metadata.HasField("vocal_language"):
        found += _check_word("metadata.vocal_language", metadata.vocal_language, LANGUAGES)
    return found


def _check_codes(codes: Sequence[int]) -> list[Violation]:
    bad = next((index for index, code in enumerate(codes) if code >= NUM_CODES), None)
    if bad is None:
        return []
    return [_violation(f"codes[{bad}]", f"is {codes[bad]}; must be 0 to {NUM_CODES - 1}")]


def _check_options(options: DiffusionOptions) -> list[Violation]:
    found: list[Violation] = []
    if options.HasField("steps"):
        found += _check_range("options.steps", options.steps, STEPS_RANGE)
    if options.HasField("shift"):
        found += _check_range("options.shift", options.shift, SHIFT_RANGE)
    return found


def _check_range(field: str, value: float, limits: tuple[float, float]) -> list[Violation]:
    low, high = limits
    # A NaN is in no range.
    return [] if low <= value <= high else [_violation(field, f"is {value:g}; must be {low:g} to {high:g}")]


def _check_word(field: str, value: str, known: Sequence[str]) -> list[Violation]:
    return [] if value in known else [_violation(field, f"is {value!r}; must be one of {', '.join(known)}")]


def _violation(field: str, description: str) -> Violation:
    return Violation(field=field, description=description)
