"""Checks that several processes make of a request."""

import math

import pytest

from soundstage.type.v1.options_pb2 import (
    SAMPLER_SDE,
    AdapterUse,
    DiffusionOptions,
    Guidance,
    Retake,
    SamplingOptions,
    WaveletCorrection,
)
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage.type.v1.task_pb2 import (
    TRACK_BASS,
    TRACK_DRUMS,
    TRACK_UNSPECIFIED,
    Complete,
    Cover,
    Edit,
    Extract,
    Lego,
    Repaint,
    Task,
)
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
    checks.diffusion(DiffusionOptions(steps=201, shift=-math.inf), field="diffusion")
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
        "diffusion.steps": "is 201; must be 1 to 200",
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


@pytest.mark.parametrize(
    ("options", "field", "description"),
    [
        (DiffusionOptions(steps=21), "steps", "is 21; must be 1 to 20"),
        (DiffusionOptions(shift=math.nan), "shift", "is nan; must be 1 to 5"),
        (DiffusionOptions(timesteps=[0.0]), "timesteps", "has 0 times above 0; must be 1 to 20"),
        (
            DiffusionOptions(timesteps=[1 / n for n in range(1, 22)]),
            "timesteps",
            "has 21 times above 0; must be 1 to 20",
        ),
        (
            DiffusionOptions(timesteps=[1.1, 0.5]),
            "timesteps[0]",
            "is 1.1; times must fall, from at most 1 to above 0",
        ),
        (
            DiffusionOptions(timesteps=[0.5, 0.5]),
            "timesteps[1]",
            "is 0.5; times must fall, from at most 1 to above 0",
        ),
        (
            DiffusionOptions(timesteps=[0.5, 0.0, -0.5]),
            "timesteps[1]",
            "is 0; times must fall, from at most 1 to above 0",
        ),
        (
            DiffusionOptions(timesteps=[math.nan]),
            "timesteps[0]",
            "is nan; times must fall, from at most 1 to above 0",
        ),
        (DiffusionOptions(guidance=Guidance(scale=0.9)), "guidance.scale", "is 0.9; must be 1 to 15"),
        (
            DiffusionOptions(guidance=Guidance(interval_start=0.6, interval_end=0.5)),
            "guidance.interval_end",
            "is 0.5; must be at least interval_start, 0.6",
        ),
        (DiffusionOptions(guidance=Guidance(interval_start=-1)), "guidance.interval_start", "is -1; must be 0 to 1"),
        (DiffusionOptions(velocity_norm_threshold=11), "velocity_norm_threshold", "is 11; must be 0 to 10"),
        (DiffusionOptions(velocity_ema_factor=1), "velocity_ema_factor", "is 1; must be below 1"),
        (
            DiffusionOptions(wavelet_correction=WaveletCorrection(high_scale=2)),
            "wavelet_correction.high_scale",
            "is 2; must be 0 to 1",
        ),
        (DiffusionOptions(latent_shift=-11), "latent_shift", "is -11; must be -10 to 10"),
        (DiffusionOptions(latent_rescale=0), "latent_rescale", "is 0; must be 0.1 to 10"),
        (DiffusionOptions(retake=Retake(variance=1.5)), "retake.variance", "is 1.5; must be 0 to 1"),
        (
            DiffusionOptions(sampler=9),  # pyright: ignore[reportArgumentType]
            "sampler",
            "is 9; must be one of SAMPLER_EULER, SAMPLER_HEUN, SAMPLER_SDE",
        ),
        (
            DiffusionOptions(mask_mode=3),  # pyright: ignore[reportArgumentType]
            "mask_mode",
            "is 3; must be one of MASK_MODE_EXPLICIT, MASK_MODE_AUTO",
        ),
    ],
)
def test_a_bad_option_is_named(options: DiffusionOptions, field: str, description: str) -> None:
    checks = Checks()
    checks.diffusion(options, field="options", max_steps=20)
    assert violations(checks) == {f"options.{field}": description}


@pytest.mark.parametrize(
    ("task", "field", "description"),
    [
        (Task(cover=Cover(strength=1.1)), "cover.strength", "is 1.1; must be 0 to 1"),
        (Task(cover=Cover(noise_strength=math.nan)), "cover.noise_strength", "is nan; must be 0 to 1"),
        (Task(repaint=Repaint(start_s=-301)), "repaint.start_s", "is -301; must be -300 to 600"),
        (Task(repaint=Repaint(start_s=3, end_s=3)), "repaint.end_s", "is 3; must be above start_s, 3"),
        (Task(repaint=Repaint(start_s=3, end_s=math.inf)), "repaint.end_s", "is inf; must be -300 to 900"),
        (Task(repaint=Repaint(strength=-0.1)), "repaint.strength", "is -0.1; must be 0 to 1"),
        (Task(lego=Lego(start_s=-1)), "lego.start_s", "is -1; must be 0 to 600"),
        (Task(lego=Lego(end_s=0)), "lego.end_s", "is 0; must be above start_s, 0"),
        (
            Task(complete=Complete(tracks=[TRACK_DRUMS, TRACK_BASS, TRACK_DRUMS])),
            "complete.tracks[2]",
            "is TRACK_DRUMS once more; name each once",
        ),
        (
            Task(edit=Edit(source_caption="<think>")),
            "edit.source_caption",
            "holds the control token <think>; take it out",
        ),
        (Task(edit=Edit(source_lyrics="x" * 8193)), "edit.source_lyrics", "has 8193 characters; at most 8192"),
        (Task(edit=Edit(start=0.6, end=0.5)), "edit.end", "is 0.5; must be at least start, 0.6"),
        (Task(edit=Edit(averages=0)), "edit.averages", "is 0; must be 1 to 8"),
        (Task(edit=Edit(averages=9)), "edit.averages", "is 9; must be 1 to 8"),
    ],
)
def test_a_bad_field_of_a_task_is_named(task: Task, field: str, description: str) -> None:
    checks = Checks()
    checks.task(task, field="task")
    assert violations(checks) == {f"task.{field}": description}


def test_more_entries_than_may_be_are_refused_by_their_number_alone() -> None:
    checks = Checks()
    checks.task(Task(complete=Complete(tracks=[TRACK_DRUMS] * 40_000)), field="task")
    checks.adapters([AdapterUse()] * 17, field="adapters")
    assert violations(checks) == {
        "task.complete.tracks": "has 40000 entries; at most 12",
        "adapters": "has 17 entries; at most 16",
    }


def test_a_track_that_is_none_or_unknown_is_named() -> None:
    checks = Checks()
    checks.task(Task(complete=Complete(tracks=[TRACK_UNSPECIFIED])), field="none")
    checks.task(Task(extract=Extract(track=13)), field="unknown")  # pyright: ignore[reportArgumentType]
    found = violations(checks)
    assert set(found) == {"none.complete.tracks[0]", "unknown.extract.track"}
    assert all("TRACK_WOODWINDS, TRACK_BRASS" in description for description in found.values())


def test_options_and_tasks_in_range_pass() -> None:
    checks = Checks()
    checks.diffusion(
        DiffusionOptions(
            steps=200,
            timesteps=[1, 0.5, 0],
            sampler=SAMPLER_SDE,
            guidance=Guidance(scale=15, interval_start=0.4, interval_end=0.4),
            velocity_ema_factor=0.99,
            latent_rescale=0.1,
            retake=Retake(seed=3, variance=1),
        ),
        field="options",
    )
    for task in (
        Task(),
        Task(cover=Cover(strength=0, noise_strength=1)),
        Task(repaint=Repaint(start_s=-300, end_s=900)),
        Task(repaint=Repaint(start_s=600)),
        Task(extract=Extract()),
        Task(lego=Lego(end_s=1)),
        Task(complete=Complete(tracks=[TRACK_DRUMS, TRACK_BASS])),
        Task(edit=Edit(start=1, averages=8)),
    ):
        checks.task(task, field="task")
    checks.adapters([AdapterUse(name=f"{n}") for n in range(16)], field="adapters")
    checks.finish()
