"""Requests are checked whole."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_S16
from soundstage_gateway.order import Order, read_order
from soundstage_gateway.sound import Sound
from soundstage_runtime.errors import InvalidRequestError

SOUNDS = {
    "assets/ten": Sound(num_frames=480_000),
    "assets/blink": Sound(num_frames=1920),
    "assets/longest": Sound(num_frames=28_800_000),
    "assets/silence": Sound(num_frames=480_000, is_silent=True),
}


def ask(**fields: Any) -> GenerateSongRequest:
    return GenerateSongRequest(**fields)


def read(request: GenerateSongRequest) -> Order:
    return read_order(request, SOUNDS, draw_seed=lambda: 99)


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
        ({"output": {"format": {"sample_format": 9}}}, "output.format.sample_format"),
        ({"variants": 0}, "variants"),
        ({"variants": 9}, "variants"),
        ({"seeds": [1, 2]}, "seeds"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], bad: str) -> None:
    assert bad_fields(ask(**{"caption": "a calm piano"} | fields)) == [bad]


TEN: dict[str, Any] = {"source": "assets/ten"}


@pytest.mark.parametrize(
    ("fields", "bad", "words"),
    [
        ({"source": "assets/ten"}, "source", "is set, but task is not"),
        ({"task": {"extract": {}}}, "source", "is not set, and task.extract needs one: send the file with"),
        ({"task": {"cover": {}}}, "source", "or give codes"),
        ({"task": {"cover": {}}, "source": "assets/gone"}, "source", "is 'assets/gone', which is not kept here"),
        ({"task": {"cover": {}}, "codes": [0] * 5, **TEN}, "codes", "give one of them"),
        ({"task": {"cover": {"from_latents": True}}, "codes": [0] * 5}, "task.cover.from_latents", "have no latents"),
        ({"task": {"repaint": {}}, "codes": [0] * 5, **TEN}, "codes", "task.repaint works on a source"),
        ({"task": {"cover": {"strength": 2}}, **TEN}, "task.cover.strength", "is 2; must be 0 to 1"),
        (
            {"task": {"cover": {}}, "metadata": {"duration_s": 10}, **TEN},
            "metadata.duration_s",
            "as long as its source",
        ),
        ({"task": {"cover": {}}, "planner": {"enabled": True}, **TEN}, "planner.enabled", "leave it out"),
        ({"task": {"cover": {}}, "source": "assets/blink"}, "source", "a song of 0.04 s; it must be 1 to 600 s long"),
        (
            {"task": {"repaint": {"start_s": 10}}, **TEN},
            "task.repaint.start_s",
            "a window of 0 s; it must be 0.04 s or longer",
        ),
        (
            {"task": {"repaint": {"start_s": 11, "end_s": 12}}, **TEN},
            "task.repaint.start_s",
            "must be at most 10, the source's end",
        ),
        ({"task": {"repaint": {"start_s": -2, "end_s": -1}}, **TEN}, "task.repaint.end_s", "must be at least 0"),
        ({"task": {"repaint": {"start_s": 2, "end_s": 2.03}}, **TEN}, "task.repaint.end_s", "a window of 0.03 s"),
        ({"task": {"repaint": {"start_s": 2, "end_s": 1}}, **TEN}, "task.repaint.end_s", "must be above start_s, 2"),
        ({"task": {"repaint": {"end_s": 601}}, **TEN}, "task.repaint", "a song of 601 s; it must be 1 to 600 s long"),
        (
            {"task": {"repaint": {"start_s": -1}}, "source": "assets/longest"},
            "task.repaint",
            "makes a song of 601 s",
        ),
        ({"task": {"lego": {"start_s": 10}}, **TEN}, "task.lego.start_s", "must be below 10, the source's end"),
        ({"task": {"lego": {"end_s": 10.1}}, **TEN}, "task.lego.end_s", "must be at most 10, the source's end"),
        ({"task": {"edit": {"source_caption": "<think>"}}, **TEN}, "task.edit.source_caption", "control token"),
        ({"references": ["assets/ten"] * 5}, "references", "has 5 entries; at most 4"),
        ({"references": ["assets/ten", "x"]}, "references[1]", "is 'x', which is not kept here"),
        ({"references": ["assets/silence"]}, "references[0]", "which is silent; give one that can be heard"),
        ({"adapters": [{"name": ""}]}, "adapters[0].name", "is empty"),
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters[1].name", "is 'a' once more"),
        ({"adapters": [{"name": "adapters/a"}, {"name": "a"}]}, "adapters[1].name", "is 'a' once more"),
        ({"adapters": [{"name": "a", "scale": 2.5}]}, "adapters[0].scale", "is 2.5; must be -2 to 2"),
    ],
)
def test_a_task_that_cannot_be_is_refused_with_what_would_do(fields: dict[str, Any], bad: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(ask(**{"caption": "a calm piano"} | fields))
    assert [violation.field for violation in caught.value.violations] == [bad]
    assert words in caught.value.violations[0].description


def test_a_task_with_a_source_needs_no_words_and_no_planner_and_takes_the_sources_length() -> None:
    order = read(ask(task={"extract": {"track": "TRACK_DRUMS"}}, source="assets/ten"))
    assert not order.is_planned
    assert order.source is not None
    assert (order.source.num_frames, order.metadata.duration_s, order.splice) == (480_000, 10, None)


@pytest.mark.parametrize("duration_s", [1, 4.99, 5.6, 600])
def test_a_duration_other_than_that_of_the_codes_is_refused(duration_s: float) -> None:
    with pytest.raises(InvalidRequestError, match=f"duration_s is {duration_s:g}; the codes make 5.2 s: leave it out"):
        read(ask(caption="x", codes=[1] * 26, metadata={"duration_s": duration_s}))


@pytest.mark.parametrize("duration_s", [5.2, 5.3, 5.39])
def test_a_plan_keeps_its_duration_though_its_codes_are_whole(duration_s: float) -> None:
    assert len(read(ask(caption="x", codes=[1] * 26, metadata={"duration_s": duration_s})).codes) == 26


def test_a_cover_of_codes_needs_no_source() -> None:
    order = read(ask(caption="x", task={"cover": {}}, codes=[1] * 5))
    assert (order.source, order.codes, order.is_planned) == (None, (1,) * 5, False)


@pytest.mark.parametrize(
    ("window", "lead", "total", "moved"),
    [
        ({"start_s": 2, "end_s": 5}, 0, 10, (2, 5)),
        ({"start_s": 2}, 0, 10, (2, 10)),
        ({"start_s": -3, "end_s": 2}, 3, 13, (0, 5)),
        ({"start_s": 10, "end_s": 14.5}, 0, 14.5, (10, 14.5)),
        ({"start_s": -1, "end_s": 11}, 1, 12, (0, 12)),
        ({"start_s": -1, "end_s": 0}, 1, 11, (0, 1)),
    ],
)
def test_a_repaint_beyond_the_ends_makes_room_and_moves_its_window(
    window: dict[str, float], lead: float, total: float, moved: tuple[float, float]
) -> None:
    order = read(ask(caption="x", task={"repaint": window}, source="assets/ten"))
    assert order.source is not None
    assert order.splice is not None
    assert (order.source.lead_frames, order.source.num_frames) == (lead * 48_000, total * 48_000)
    assert (order.task.repaint.start_s, order.task.repaint.end_s) == moved
    assert (order.splice.start, order.splice.end) == (moved[0] * 48_000, moved[1] * 48_000)


@pytest.mark.parametrize(
    ("mode", "fade_frames"),
    [
        ({}, 1200),
        ({"mode": "REPAINT_MODE_BALANCED", "strength": 0.25}, 1800),
        ({"mode": "REPAINT_MODE_BALANCED", "strength": 0}, 2400),
        ({"mode": "REPAINT_MODE_CONSERVATIVE", "strength": 0.9}, 2400),
        ({"mode": "REPAINT_MODE_BALANCED", "strength": 1}, None),
        ({"mode": "REPAINT_MODE_AGGRESSIVE"}, None),
    ],
)
def test_the_mode_decides_what_is_kept_and_how_long_the_crossfades_are(
    mode: dict[str, Any], fade_frames: int | None
) -> None:
    order = read(ask(caption="x", task={"repaint": {"start_s": 2, "end_s": 5} | mode}, source="assets/ten"))
    assert (order.splice.fade_frames if order.splice else None) == fade_frames


@given(start_s=st.floats(), end_s=st.floats(), with_end=st.booleans(), strength=st.floats())
def test_any_repaint_becomes_an_order_that_fits_or_is_refused(
    start_s: float, end_s: float, with_end: bool, strength: float
) -> None:
    window = {"start_s": start_s, "strength": strength} | ({"end_s": end_s} if with_end else {})
    try:
        order = read(ask(caption="x", task={"repaint": window}, source="assets/ten"))
    except InvalidRequestError as error:
        assert error.violations
    else:
        assert order.source is not None
        assert 48_000 <= order.source.num_frames <= 28_800_000
        assert 0 <= order.task.repaint.start_s < order.task.repaint.end_s <= order.source.duration_s


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
    assert order.output.format.sample_format == SAMPLE_FORMAT_S16


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
