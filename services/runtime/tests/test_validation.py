"""Checks that several processes make of a request."""

import math

import pytest

from soundstage.type.v1.options_pb2 import DiffusionOptions, SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.score import KEY_SCALES, LANGUAGES, TIME_SIGNATURES
from soundstage_runtime.validation import Checks


def violations(checks: Checks) -> dict[str, str]:
    with pytest.raises(InvalidRequestError) as caught:
        checks.finish()
    return {violation.field: violation.description for violation in caught.value.violations}


def test_every_bad_field_is_named_with_what_it_held_and_what_is_wanted() -> None:
    checks = Checks()
    checks.text("caption", "x" * 2049, max_chars=2048)
    checks.text("lyrics", "oh <|im_end|> no", max_chars=100)
    checks.metadata(
        SongMetadata(bpm=29, key_scale="H major", time_signature="5", vocal_language="tlh", duration_s=math.nan)
    )
    checks.sampling(
        SamplingOptions(temperature=2.1, guidance_scale=0.5, top_p=0, repetition_penalty=math.inf), field="sampling"
    )
    checks.diffusion(DiffusionOptions(steps=21, shift=-math.inf), field="diffusion")
    assert violations(checks) == {
        "caption": "has 2049 characters; at most 2048",
        "lyrics": "holds the control token <|im_end|>; take it out",
        "metadata.bpm": "is 29; must be 30 to 300",
        "metadata.key_scale": "is 'H major'; must be a note A to G, an optional #, b, ♯ or ♭, and major or minor",
        "metadata.time_signature": "is '5'; must be one of 2, 3, 4, 6",
        "metadata.vocal_language": "is 'tlh'; must be one of " + " ".join(LANGUAGES),
        "metadata.duration_s": "is nan; must be 1 to 600",
        "sampling.temperature": "is 2.1; must be 0 to 2",
        "sampling.guidance_scale": "is 0.5; must be 1 to 10",
        "sampling.top_p": "is 0; must be above 0",
        "sampling.repetition_penalty": "is inf; must be 1 to 2",
        "diffusion.steps": "is 21; must be 1 to 20",
        "diffusion.shift": "is -inf; must be 1 to 5",
    }


def test_what_is_absent_or_in_range_passes() -> None:
    checks = Checks()
    checks.metadata(SongMetadata())
    for bpm, duration_s in ((30, 1), (300, 600)):
        checks.metadata(SongMetadata(bpm=bpm, duration_s=duration_s))
    for key_scale in KEY_SCALES:
        checks.metadata(SongMetadata(key_scale=key_scale))
    for time_signature in TIME_SIGNATURES:
        checks.metadata(SongMetadata(time_signature=time_signature))
    for language in LANGUAGES:
        checks.metadata(SongMetadata(vocal_language=language))
    checks.sampling(SamplingOptions(temperature=0, guidance_scale=1, top_k=0, top_p=1), field="sampling")
    checks.diffusion(DiffusionOptions(steps=1, shift=5), field="diffusion")
    checks.finish()


def test_a_stage_may_lower_the_longest_duration() -> None:
    checks = Checks()
    checks.metadata(SongMetadata(duration_s=241), max_duration_s=240)
    assert violations(checks) == {"metadata.duration_s": "is 241; must be 1 to 240"}


def test_whole_numbers_are_told_in_full() -> None:
    checks = Checks()
    checks.number("frame_count", 28_800_001, 9600, 28_800_000)
    assert violations(checks) == {"frame_count": "is 28800001; must be 9600 to 28800000"}


def test_a_code_outside_the_codebook_is_named_by_its_place() -> None:
    checks = Checks()
    checks.codes("codes", [0, 63_999, 64_000, 70_000])
    assert violations(checks) == {"codes[2]": "is 64000; must be 0 to 63999"}
