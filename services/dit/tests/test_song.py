"""Requests, read and checked."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.stage.v1.dit_service_pb2 import DenoiseSetup
from soundstage.type.v1 import options_pb2 as options
from soundstage.type.v1 import task_pb2 as tasks
from soundstage.type.v1.options_pb2 import AdapterUse, DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_dit.request import read_song
from soundstage_dit.schedule import schedule
from soundstage_dit.song import (
    Complete,
    Cover,
    Diffusion,
    Edit,
    Extract,
    Guidance,
    GuidanceMethod,
    Lego,
    Repaint,
    Retake,
    Sampler,
    Song,
    Task,
    Wavelet,
)
from soundstage_runtime.errors import InvalidRequestError

VARIANTS = ("turbo", "xl-turbo", "sft", "xl-sft", "base", "xl-base")


def violations(setup: DenoiseSetup, *, variant: str) -> dict[str, str]:
    """What is refused, by field."""
    with pytest.raises(InvalidRequestError) as caught:
        read_song(setup, variant=variant)
    return {violation.field: violation.description for violation in caught.value.violations}


def task_of(task: tasks.Task, *, latent_frames: int = 100) -> Task:
    """The task that a base model is asked for."""
    return read_song(DenoiseSetup(latent_frames=latent_frames, task=task), variant="base").task


def test_absent_fields_take_their_defaults() -> None:
    song = read_song(DenoiseSetup(caption="a", lyrics="b", latent_frames=10, seed=3), variant="turbo")
    assert song == Song(caption="a", lyrics="b", num_frames=10, seed=3)
    assert (song.diffusion.times, song.language) == (tuple(schedule(8, 3.0)), "unknown")


def test_given_fields_are_read() -> None:
    metadata = SongMetadata(bpm=30, key_scale="F♯ minor", time_signature="6", vocal_language="yue", duration_s=600)
    request = DenoiseSetup(
        caption="a",
        lyrics="",
        latent_frames=15_000,
        seed=2**32 - 1,
        codes=[0, 63_999],
        metadata=metadata,
        options=DiffusionOptions(steps=20, shift=5),
    )
    assert read_song(request, variant="turbo") == Song(
        caption="a",
        lyrics="",
        num_frames=15_000,
        seed=2**32 - 1,
        codes=(0, 63_999),
        bpm=30,
        key_scale="F♯ minor",
        time_signature="6",
        language="yue",
        duration_s=600,
        diffusion=Diffusion(times=tuple(schedule(20, 5))),
    )


def test_codes_beyond_the_song_are_cut() -> None:
    assert read_song(DenoiseSetup(latent_frames=11, codes=range(9)), variant="turbo").codes == (0, 1, 2)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (DenoiseSetup(latent_frames=1, caption="a <|im_end|> b"), "caption"),
        (DenoiseSetup(latent_frames=1, lyrics="<think>"), "lyrics"),
        (DenoiseSetup(latent_frames=0), "latent_frames"),
        (DenoiseSetup(latent_frames=15_001), "latent_frames"),
        (DenoiseSetup(latent_frames=5, codes=[1, 64_000, 70_000]), "codes[1]"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(bpm=29)), "metadata.bpm"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(bpm=0)), "metadata.bpm"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(duration_s=0.5)), "metadata.duration_s"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(duration_s=math.nan)), "metadata.duration_s"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(duration_s=math.inf)), "metadata.duration_s"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(key_scale="H major")), "metadata.key_scale"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(key_scale="")), "metadata.key_scale"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(time_signature="5")), "metadata.time_signature"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(vocal_language="xx")), "metadata.vocal_language"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(steps=0)), "options.steps"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(steps=21)), "options.steps"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(shift=0.9)), "options.shift"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(shift=math.nan)), "options.shift"),
    ],
)
def test_a_bad_field_is_named(request_: DenoiseSetup, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_song(request_, variant="turbo")
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_options_take_the_variants_defaults(variant: str) -> None:
    is_turbo = variant.endswith("turbo")
    diffusion = read_song(DenoiseSetup(latent_frames=1), variant=variant).diffusion
    assert diffusion == Diffusion(
        times=tuple(schedule(8, 3.0) if is_turbo else schedule(50, 1.0)),
        guidance=Guidance(scale=1.0 if is_turbo else 7.0),
    )


def test_given_options_are_read() -> None:
    asked = DiffusionOptions(
        steps=200,
        shift=2,
        sampler=options.SAMPLER_HEUN,
        guidance=options.Guidance(
            scale=3, method=options.GUIDANCE_METHOD_ADG_NORMED, interval_start=0.25, interval_end=0.75
        ),
        velocity_norm_threshold=2,
        velocity_ema_factor=0.5,
        wavelet_correction=options.WaveletCorrection(mode=options.WAVELET_MODE_HIGH, scale=0.5, high_scale=0.25),
        latent_shift=-1,
        latent_rescale=2,
        mask_mode=options.MASK_MODE_AUTO,
        retake=options.Retake(seed=9, variance=0.25),
    )
    assert read_song(DenoiseSetup(latent_frames=1, options=asked), variant="sft").diffusion == Diffusion(
        times=tuple(schedule(200, 2)),
        sampler=Sampler.HEUN,
        guidance=Guidance(scale=3, method=GuidanceMethod.ADG_NORMED, start=0.25, end=0.75),
        velocity_norm_threshold=2,
        velocity_ema_factor=0.5,
        wavelet=Wavelet(mode="high", scale=0.5, high_scale=0.25),
        latent_shift=-1,
        latent_rescale=2,
        is_mask_explicit=False,
        retake=Retake(seed=9, variance=0.25),
    )


def test_parts_of_options_that_are_there_but_empty_take_their_defaults() -> None:
    asked = DiffusionOptions(
        wavelet_correction=options.WaveletCorrection(), retake=options.Retake(seed=1), guidance=options.Guidance()
    )
    diffusion = read_song(DenoiseSetup(latent_frames=1, options=asked), variant="base").diffusion
    assert (diffusion.wavelet, diffusion.retake) == (Wavelet(), Retake(seed=1, variance=0.5))
    assert diffusion.guidance == Guidance(scale=7.0)


@pytest.mark.parametrize("end", [[], [0.0]])
def test_a_turbo_model_takes_the_nearest_of_its_times_and_others_take_them_as_they_are(end: list[float]) -> None:
    times = [0.97, 0.76, 0.615, 0.5, 0.395, 0.28, 0.18, 0.085]
    setup = DenoiseSetup(latent_frames=1, options=DiffusionOptions(timesteps=times + end))
    nearest = [0.954545, 0.769231, 0.625, 0.5, 0.4, 0.3, 0.222222, 0.125, 0]
    assert read_song(setup, variant="turbo").diffusion.times == pytest.approx(nearest, abs=1e-6)
    assert read_song(setup, variant="base").diffusion.times == (*times, 0.0)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"cover": tasks.Cover()}, Cover(strength=1, noise_strength=0, from_latents=False)),
        (
            {"cover": tasks.Cover(strength=0, noise_strength=0.5, from_latents=True)},
            Cover(strength=0, noise_strength=0.5, from_latents=True),
        ),
        ({"extract": tasks.Extract()}, Extract()),
        ({"extract": tasks.Extract(track=tasks.TRACK_BACKING_VOCALS)}, Extract(track="backing_vocals")),
        ({"lego": tasks.Lego(track=tasks.TRACK_FX)}, Lego(track="fx")),
        ({"lego": tasks.Lego(start_s=1)}, Lego(start=25, end=100)),
        ({"lego": tasks.Lego(end_s=1)}, Lego(start=0, end=25)),
        ({"complete": tasks.Complete()}, Complete()),
        (
            {"complete": tasks.Complete(tracks=[tasks.TRACK_DRUMS, tasks.TRACK_BASS])},
            Complete(tracks=("drums", "bass")),
        ),
        (
            {"edit": tasks.Edit(source_caption="a", source_lyrics="b")},
            Edit(source_caption="a", source_lyrics="b", start=0, end=1, averages=1, context="silence"),
        ),
        (
            {"edit": tasks.Edit(start=0.2, end=0.5, averages=3, context=tasks.EDIT_CONTEXT_CODES)},
            Edit(source_caption="", source_lyrics="", start=0.2, end=0.5, averages=3, context="codes"),
        ),
    ],
)
def test_a_task_is_read(asked: dict[str, Any], expected: Task) -> None:
    assert task_of(tasks.Task(**asked)) == expected


@pytest.mark.parametrize(
    ("mode", "strength", "injection", "blend_frames"),
    [
        (tasks.REPAINT_MODE_UNSPECIFIED, None, 0.5, 12),
        (tasks.REPAINT_MODE_BALANCED, 0.5, 0.5, 12),
        (tasks.REPAINT_MODE_BALANCED, 0.25, 0.75, 19),
        (tasks.REPAINT_MODE_BALANCED, 0.0, 1.0, 25),
        (tasks.REPAINT_MODE_BALANCED, 1.0, 0.0, 0),
        (tasks.REPAINT_MODE_CONSERVATIVE, 0.9, 1.0, 25),
        (tasks.REPAINT_MODE_AGGRESSIVE, None, 0.0, 0),
    ],
)
def test_a_mode_says_how_much_of_the_rest_a_repaint_keeps(
    mode: tasks.RepaintMode.ValueType, strength: float | None, injection: float, blend_frames: int
) -> None:
    repaint = tasks.Repaint(start_s=1, end_s=2, mode=mode, strength=strength)
    expected = Repaint(start=25, end=50, injection=injection, blend_frames=blend_frames)
    assert task_of(tasks.Task(repaint=repaint)) == expected


@pytest.mark.parametrize(
    ("start_s", "end_s", "window"),
    [
        (1, 2, (25, 50)),
        (0.039, 0.08, (0, 2)),
        (0, None, (0, 100)),
        (-3, 1, (0, 25)),
        (3, 9, (75, 100)),
        (9, None, (99, 100)),
        (9, 12, (99, 100)),
        (1, 1.001, (25, 26)),
        (-3, -2, (0, 1)),
        # 1.16 x 48000 is a little less than 55680 in floating point, where frame 29 begins.
        (1.16, None, (29, 100)),
    ],
)
def test_a_window_lies_in_the_song_and_has_a_frame(
    start_s: float, end_s: float | None, window: tuple[int, int]
) -> None:
    task = task_of(tasks.Task(repaint=tasks.Repaint(start_s=start_s, end_s=end_s)))
    assert isinstance(task, Repaint)
    assert (task.start, task.end) == window


@given(frame=st.integers(0, 14_999))
def test_a_window_begins_with_the_frame_that_begins_at_its_time(frame: int) -> None:
    task = task_of(tasks.Task(repaint=tasks.Repaint(start_s=frame * 1920 / 48_000)), latent_frames=15_000)
    assert isinstance(task, Repaint)
    assert task.start == frame


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "asked", "able"),
    [
        ("extract", tasks.Extract(), "base and xl-base"),
        ("lego", tasks.Lego(), "base, xl-base and sft-stems"),
        ("complete", tasks.Complete(), "base and xl-base"),
    ],
)
def test_tracks_are_for_base_models(variant: str, kind: str, asked: Any, able: str) -> None:
    setup = DenoiseSetup(latent_frames=1, task=tasks.Task(**{kind: asked}))
    if variant.endswith("base"):
        read_song(setup, variant=variant)
    else:
        expected = f"is for models of the variants {able}; this one is {variant}"
        assert violations(setup, variant=variant) == {f"task.{kind}": expected}


def test_a_model_for_stems_adds_tracks_to_a_mix_that_is_described() -> None:
    setup = DenoiseSetup(latent_frames=1, task=tasks.Task(lego=tasks.Lego(global_caption="a rock song")))
    assert read_song(setup, variant="sft-stems").task == Lego(mix="a rock song")
    expected = "is for models of the variant sft-stems; this one is base"
    assert violations(setup, variant="base") == {"task.lego.global_caption": expected}
    complete = DenoiseSetup(latent_frames=1, task=tasks.Task(complete=tasks.Complete()))
    assert violations(complete, variant="xl-sft-stems").keys() == {"task.complete"}
    setup.task.lego.global_caption = "a" * 2049
    assert violations(setup, variant="sft-stems").keys() == {"task.lego.global_caption"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_turbo_models_take_no_guidance(variant: str) -> None:
    for scale in (1, 1.5):
        setup = DenoiseSetup(latent_frames=1, options=DiffusionOptions(guidance=options.Guidance(scale=scale)))
        if scale > 1 and variant.endswith("turbo"):
            found = violations(setup, variant=variant)
            assert found == {
                "options.guidance.scale": f"is 1.5; a {variant} model has its guidance built in: "
                "leave it out, or ask a base or sft model"
            }
        else:
            assert read_song(setup, variant=variant).diffusion.guidance.scale == scale


def test_turbo_models_take_at_most_20_times() -> None:
    times = [1 - step / 30 for step in range(21)]
    setup = DenoiseSetup(latent_frames=1, options=DiffusionOptions(timesteps=times))
    assert violations(setup, variant="turbo") == {"options.timesteps": "has 21 times above 0; must be 1 to 20"}
    assert read_song(setup, variant="base").diffusion.steps == 21


EDIT = tasks.Task(edit=tasks.Edit())


@pytest.mark.parametrize(
    ("fields", "field", "description"),
    [
        ({"source_frames": 9}, "source_frames", "is 9; must be 0 without a task, which would use it"),
        (
            {"source_frames": 9, "task": tasks.Task(cover=tasks.Cover())},
            "source_frames",
            "is 9; must be latent_frames, 10, or 0",
        ),
        (
            {"codes": [1, 2], "task": tasks.Task(extract=tasks.Extract())},
            "codes",
            "has 2 codes; task extract takes none: only cover does, or no task",
        ),
        ({"reference_count": 5}, "reference_count", "is 5; must be 0 to 4"),
        ({"task": tasks.Task(cover=tasks.Cover(strength=2))}, "task.cover.strength", "is 2; must be 0 to 1"),
        (
            {"task": EDIT, "options": DiffusionOptions(sampler=options.SAMPLER_SDE)},
            "options.sampler",
            "must be SAMPLER_EULER for an edit",
        ),
        (
            {
                "task": EDIT,
                "options": DiffusionOptions(guidance=options.Guidance(method=options.GUIDANCE_METHOD_ADG)),
            },
            "options.guidance.method",
            "must be GUIDANCE_METHOD_APG or GUIDANCE_METHOD_CFG for an edit",
        ),
        (
            {"task": EDIT, "options": DiffusionOptions(wavelet_correction=options.WaveletCorrection())},
            "options.wavelet_correction",
            "is given; an edit takes none",
        ),
        ({"adapters": [AdapterUse()]}, "adapters[0].name", "is empty; ListAdapters has the names"),
        (
            {"adapters": [AdapterUse(name="a"), AdapterUse(name="a")]},
            "adapters[1].name",
            "is 'a' once more; name each once",
        ),
        ({"adapters": [AdapterUse(name="a", scale=2.5)]}, "adapters[0].scale", "is 2.5; must be -2 to 2"),
    ],
)
def test_what_does_not_go_together_is_named(fields: dict[str, Any], field: str, description: str) -> None:
    assert violations(DenoiseSetup(latent_frames=10, **fields), variant="base") == {field: description}


def test_adapters_have_a_strength_of_1_unless_they_are_given_one() -> None:
    setup = DenoiseSetup(latent_frames=1, adapters=[AdapterUse(name="a"), AdapterUse(name="b", scale=0)])
    assert read_song(setup, variant="turbo").adapters == (("a", 1.0), ("b", 0.0))
