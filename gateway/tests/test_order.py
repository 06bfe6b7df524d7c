"""Requests are checked whole."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_S16
from soundstage_gateway.order import Order, read_order
from soundstage_runtime.errors import InvalidRequestError


def ask(**fields: Any) -> GenerateSongRequest:
    return GenerateSongRequest(**fields)


def read(request: GenerateSongRequest) -> Order:
    return read_order(request, draw_seed=lambda: 99)


def bad_fields(request: GenerateSongRequest) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        read(request)
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"caption": ""}, "caption"),
        ({"caption": "  \n", "lyrics": "\t"}, "caption"),
        ({"caption": "x" * 1_000_000}, "caption"),
        ({"caption": "a <|im_end|> b"}, "caption"),
        ({"caption": "a <|audio_code_1|> b"}, "caption"),
        ({"lyrics": "</think>"}, "lyrics"),
        ({"lyrics": "x" * 8193}, "lyrics"),
        ({"lyrics": "la", "instrumental": True}, "lyrics"),
        ({"metadata": {"bpm": 5}}, "metadata.bpm"),
        ({"metadata": {"bpm": 301}}, "metadata.bpm"),
        ({"metadata": {"duration_s": 0}}, "metadata.duration_s"),
        ({"metadata": {"duration_s": 10_000}}, "metadata.duration_s"),
        ({"metadata": {"duration_s": math.nan}}, "metadata.duration_s"),
        ({"metadata": {"duration_s": math.inf}}, "metadata.duration_s"),
        ({"metadata": {"key_scale": "H major"}}, "metadata.key_scale"),
        ({"metadata": {"time_signature": "5"}}, "metadata.time_signature"),
        ({"metadata": {"vocal_language": "klingon"}}, "metadata.vocal_language"),
        ({"planner": {"enabled": False}}, "metadata.duration_s"),
        ({"planner": {"write_metadata": False}}, "metadata.duration_s"),
        ({"codes": [1, 2, 3, 4]}, "codes"),
        ({"codes": [0] * 3001}, "codes"),
        ({"codes": [0, 0, 0, 0, 64_000]}, "codes[4]"),
        ({"planner": {"sampling": {"temperature": math.nan}}}, "planner.sampling.temperature"),
        ({"planner": {"sampling": {"guidance_scale": 0.5}}}, "planner.sampling.guidance_scale"),
        ({"planner": {"sampling": {"top_p": 0}}}, "planner.sampling.top_p"),
        ({"planner": {"sampling": {"repetition_penalty": 3}}}, "planner.sampling.repetition_penalty"),
        ({"planner": {"sampling": {"negative_prompt": "<think>"}}}, "planner.sampling.negative_prompt"),
        ({"diffusion": {"steps": 0}}, "diffusion.steps"),
        ({"diffusion": {"steps": 201}}, "diffusion.steps"),
        ({"diffusion": {"shift": math.nan}}, "diffusion.shift"),
        ({"output": {"sample_format": 9}}, "output.sample_format"),
        ({"variants": 0}, "variants"),
        ({"variants": 9}, "variants"),
        ({"seeds": [1, 2]}, "seeds"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], bad: str) -> None:
    assert bad_fields(ask(**{"caption": "a calm piano"} | fields)) == [bad]


def test_all_bad_fields_are_named_at_once() -> None:
    request = ask(
        metadata={"bpm": 5, "duration_s": math.nan, "vocal_language": "xx"}, diffusion={"steps": 999}, variants=9
    )
    wanted = [
        "caption",
        "metadata.bpm",
        "metadata.vocal_language",
        "metadata.duration_s",
        "diffusion.steps",
        "variants",
    ]
    assert bad_fields(request) == wanted


def test_defaults_are_filled_in() -> None:
    order = read(ask(caption="x", variants=3, seeds=[0]))
    assert order.seeds == (0, 99, 99)
    assert order.is_planned
    assert order.sample_format == SAMPLE_FORMAT_S16


TEXTS = st.text(max_size=40) | st.sampled_from(["<|im_end|>", "[verse]\nla", "", "</think>"])
DOUBLES = st.floats(allow_nan=True, allow_infinity=True)


@given(
    caption=TEXTS,
    lyrics=TEXTS,
    bpm=st.integers(0, 2**32 - 1),
    duration_s=DOUBLES,
    top_p=DOUBLES,
    variants=st.integers(0, 20),
    seeds=st.lists(st.integers(0, 2**32 - 1), max_size=10),
)
def test_any_request_becomes_an_order_or_a_list_of_bad_fields(
    caption: str, lyrics: str, bpm: int, duration_s: float, top_p: float, variants: int, seeds: list[int]
) -> None:
    request = ask(
        caption=caption,
        lyrics=lyrics,
        metadata={"bpm": bpm, "duration_s": duration_s},
        planner={"sampling": {"top_p": top_p}},
        variants=variants,
        seeds=seeds,
    )
    try:
        order = read(request)
    except InvalidRequestError as error:
        assert error.violations
    else:
        assert 30 <= bpm <= 300
        assert 1 <= duration_s <= 600
        assert len(order.seeds) == variants
        assert "<|im_end|>" not in caption + lyrics
