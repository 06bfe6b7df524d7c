"""ComposeRequest, read and checked field by field."""

import math
from collections.abc import Container
from typing import Final

from soundstage.stage.v1.lm_service_pb2 import ComposeRequest
from soundstage.type.v1.options_pb2 import SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_lm.brief import Brief, Metadata, Sampling
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import BPM_RANGE, DURATION_RANGE_S, KEY_SCALES, LANGUAGES, TIME_SIGNATURES
from soundstage_runtime.text import control_tokens

MAX_CAPTION_CHARACTERS: Final = 2048
MAX_LYRICS_CHARACTERS: Final = 8192


def read_request(request: ComposeRequest, *, max_duration_s: float) -> Brief:
    """Turn a request into a brief; raises InvalidRequestError naming every bad field."""
    check = _Check()
    sampling, metadata = request.sampling, request.metadata
    check.text("caption", request.caption, MAX_CAPTION_CHARACTERS)
    check.text("lyrics", request.lyrics, MAX_LYRICS_CHARACTERS)
    if metadata.HasField("bpm"):
        check.number("metadata.bpm", metadata.bpm, *BPM_RANGE)
    if metadata.HasField("key_scale"):
        check.word("metadata.key_scale", metadata.key_scale, KEY_SCALES, "such as 'F# minor'")
    if metadata.HasField("time_signature"):
        check.word("metadata.time_signature", metadata.time_signature, TIME_SIGNATURES, "2, 3, 4 or 6")
    if metadata.HasField("vocal_language"):
        check.word("metadata.vocal_language", metadata.vocal_language, LANGUAGES, "such as 'en', or 'unknown'")
    if metadata.HasField("duration_s"):
        check.number("metadata.duration_s", metadata.duration_s, DURATION_RANGE_S[0], max_duration_s)
    if sampling.HasField("temperature"):
        check.number("sampling.temperature", sampling.temperature, 0, 2)
    if sampling.HasField("guidance_scale"):
        check.number("sampling.guidance_scale", sampling.guidance_scale, 1, 10)
    if sampling.HasField("top_p"):
        check.number("sampling.top_p", sampling.top_p, math.nextafter(0, 1), 1, "above 0, at most 1")
    if sampling.HasField("repetition_penalty"):
        check.number("sampling.repetition_penalty", sampling.repetition_penalty, 1, 2)
    check.text("sampling.negative_prompt", sampling.negative_prompt, MAX_CAPTION_CHARACTERS)
    check.finish()
    return Brief(
        caption=request.caption,
        lyrics=request.lyrics,
        metadata=_read_metadata(metadata),
        seed=request.seed,
        sampling=_read_sampling(sampling),
    )


def _read_metadata(metadata: SongMetadata) -> Metadata:
    return Metadata(**{field.name: value for field, value in metadata.ListFields()})


def _read_sampling(sampling: SamplingOptions) -> Sampling:
    return Sampling(**{field.name: value for field, value in sampling.ListFields()})


class _Check:
    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def text(self, field: str, value: str, limit: int) -> None:
        if len(value) > limit:
            self._refuse(field, f"has {len(value)} characters; at most {limit}")
        if found := control_tokens(value):
            self._refuse(field, f"holds the control token {found[0]}; only plain words")

    def number(self, field: str, value: float, low: float, high: float, wanted: str = "") -> None:
        if not low <= value <= high:  # NaN is refused too
            self._refuse(field, f"is {value:g}; must be {wanted or f'{low:g} to {high:g}'}")

    def word(self, field: str, value: str, known: Container[str], wanted: str) -> None:
        if value not in known:
            self._refuse(field, f"is {value!r}; must be {wanted}")

    def finish(self) -> None:
        if self._violations:
            raise InvalidRequestError(self._violations)

    def _refuse(self, field: str, description: str) -> None:
        self._violations.append(Violation(field=field, description=description))
