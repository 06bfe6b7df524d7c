"""Whole songs against diffusers' pipeline: prompts, encoders, context, transformer and sampler together."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from numpy.typing import NDArray
from torch import Tensor

from soundstage_dit.engine import DitEngine
from soundstage_dit.sampler import draw_noise
from soundstage_dit.schedule import schedule
from soundstage_dit.song import (
    Complete,
    Cover,
    Diffusion,
    Edit,
    Extract,
    Guidance,
    Lego,
    Repaint,
    Song,
    Task,
    TextToMusic,
)
from soundstage_dit.weights import LoadedModel, load
from soundstage_runtime.worker import Worker

FIRST_SEED = 11
FROM_CODES: tuple[Task, ...] = (
    Cover(strength=0.5, noise_strength=0.25),
    Edit(source_caption="a drum", source_lyrics="la", context="codes", averages=2, start=0.25, end=0.75),
)
SOURCE_TASKS: tuple[Task, ...] = (
    *FROM_CODES,
    Cover(from_latents=True),
    Repaint(start=5, end=10, injection=0.5, blend_frames=3),
    Extract(track="bass"),
    Lego(),
    Complete(),
    Edit(source_caption="a drum", source_lyrics="la", context="silence"),
    Edit(source_caption="a drum", source_lyrics="la", context="latents"),
)


async def make(model: LoadedModel, song: Song) -> NDArray[np.float32]:
    """The latents of one song alone."""
    engine = DitEngine([model], Worker("dit"), max_batch=1)
    *_, latents = [event async for event in engine.denoise(song)]
    engine.close()
    assert isinstance(latents, np.ndarray)
    return latents


@dataclass(frozen=True)
class Source:
    """Audio [channels, samples], and the latents that the pipeline draws for it from the seed FIRST_SEED."""

    audio: Tensor
    latents: NDArray[np.float32]


@pytest.fixture(scope="session")
def source(pipeline: AceStepPipeline) -> Source:
    """14 frames of noise: a length at which a pipeline that counts in seconds finds one frame more."""
    audio = torch.randn(2, 14 * 1920, generator=torch.Generator().manual_seed(3)) * 0.1
    return Source(audio=audio, latents=encode_in_diffusers(pipeline, audio))


def encode_in_diffusers(pipe: AceStepPipeline, audio: Tensor) -> NDArray[np.float32]:
    """What the pipeline makes of a source: it draws from the global generator, and before anything else does."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(FIRST_SEED)
        return pipe.vae.encode(audio[None]).latent_dist.sample()[0].T.contiguous().numpy()


def make_in_diffusers(pipe: AceStepPipeline, song: Song, *, shift: float = 3.0, **options: Any) -> NDArray[np.float32]:
    """The same song from the pipeline, with our noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FIRST_SEED)
        return _make_in_diffusers(pipe, song, shift=shift, **options)


def _make_in_diffusers(pipe: AceStepPipeline, song: Song, **options: Any) -> NDArray[np.float32]:
    options = {"audio_duration": song.num_frames / 25, **options}
    made = pipe(
        prompt=song.caption,
        lyrics=song.lyrics,
        vocal_language=song.language,
        num_inference_steps=song.diffusion.steps,
        guidance_scale=song.diffusion.guidance.scale,
        latents=draw_noise(song.seed, song.num_frames, 64)[None],
        output_type="latent",
        bpm=song.bpm,
        keyscale=song.key_scale,
        timesignature=song.time_signature,
        audio_codes="".join(f"<|audio_code_{code}|>" for code in song.codes) or None,
        return_dict=False,
        **options,
    )[0]
    return made[0].numpy()


def assert_same(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Equal to 1e-4 of the signal: float32 noise of one forward, about 1e-6, carried through the steps."""
    assert theirs.std() > 0.3
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("frames", "steps"), [(100, 8), (225, 5)])
async def test_a_song_from_words_equals_that_of_diffusers(
    model: LoadedModel, pipeline: AceStepPipeline, shift: float, frames: int, steps: int
) -> None:
    song = Song(
        caption="A calm piano, très doux",
        lyrics="[verse]\nhello, 世界\n[chorus]\n" + "la " * 40,
        num_frames=frames,
        seed=5,
        bpm=90,
        key_scale="Eb minor",
        time_signature="3",
        language="fr",
        duration_s=frames / 25,
        diffusion=Diffusion(times=tuple(schedule(steps, shift))),
    )
    assert_same(await make(model, song), make_in_diffusers(pipeline, song, shift=shift))


async def test_a_song_from_codes_equals_that_of_diffusers(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    codes = tuple(int(code) for code in np.random.default_rng(0).integers(0, 64_000, 30))
    song = Song(
        caption="A loud piano",
        lyrics="[Instrumental]",
        num_frames=150,
        seed=6,
        language="en",
        duration_s=6,
        codes=codes,
    )
    assert_same(await make(model, song), make_in_diffusers(pipeline, song))


async def test_long_words_are_cut_as_in_diffusers(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    song = Song(
        caption="a drum " * 90,
        lyrics="la la\n" * 500,
        num_frames=50,
        seed=7,
        duration_s=2,
        diffusion=Diffusion(times=tuple(schedule(2, 3.0))),
    )
    assert_same(await make(model, song), make_in_diffusers(pipeline, song))


async def test_both_layouts_give_identical_latents(checkpoints: Path, model: LoadedModel) -> None:
    other = load(checkpoints / "pipeline", text_encoder=None, device=torch.device("cpu"), dtype=torch.float32)
    song = Song(caption="a", lyrics="b", num_frames=60, seed=8, codes=(1, 2, 3))
    assert np.array_equal(await make(model, song), await make(other, song))


async def test_a_seed_gives_the_same_latents_again(model: LoadedModel) -> None:
    song = Song(caption="a", lyrics="b", num_frames=60, seed=8)
    assert np.array_equal(await make(model, song), await make(model, song))


@pytest.mark.parametrize("fixture", ["model", "xl_model"])
@pytest.mark.parametrize("frames", [1, 2, 7, 55, 110, 218])
async def test_a_song_has_exactly_the_frames_asked_for(
    request: pytest.FixtureRequest, fixture: str, frames: int
) -> None:
    song = Song(caption="a", lyrics="b", num_frames=frames, seed=0, diffusion=Diffusion(times=tuple(schedule(1, 3.0))))
    assert (await make(request.getfixturevalue(fixture), song)).shape == (frames, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
async def test_half_precision_stays_near_float32(checkpoints: Path, model: LoadedModel, dtype: torch.dtype) -> None:
    rounded = load(
        checkpoints / "original/acestep-v15-turbo", text_encoder=None, device=torch.device("cpu"), dtype=dtype
    )
    song = Song(caption="a", lyrics="b", num_frames=100, seed=9, codes=tuple(range(20)))
    exact = await make(model, song)
    error = await make(rounded, song) - exact
    # 8 bits of mantissa err by 2^-9 an operation, 11 by 2^-12; a wrong position or time by the size of the signal.
    near = 0.1 if dtype is torch.bfloat16 else 0.02
    assert error.std() < near * exact.std()
    source = Source(audio=torch.empty(0), latents=draw_noise(1, 14, 64).numpy())
    for task in SOURCE_TASKS:
        song = song_of(task, source, scale=1.5)
        exact = await make(model, song)
        error = await make(rounded, song) - exact
        # The last bit of a source may lead to another code, which is another melody.
        assert error.std() < (1 if task in FROM_CODES else near) * exact.std()


def song_of(task: Task, source: Source | None, *, scale: float = 1.0, steps: int = 4, frames: int = 14) -> Song:
    """A song that leaves nothing else to chance."""
    return Song(
        caption="A calm piano, très doux",
        lyrics="[verse]\nhello, 世界",
        num_frames=frames,
        seed=5,
        bpm=90,
        language="fr",
        duration_s=frames / 25,
        task=task,
        source=None if source is None else source.latents,
        diffusion=Diffusion(times=tuple(schedule(steps, 3.0)), guidance=Guidance(scale=scale)),
    )


WINDOW = {"repainting_start": 0.2, "repainting_end": 0.4}  # frames 5 to 10
TASKS: dict[str, tuple[Task, dict[str, Any]]] = {
    "cover": (Cover(), {}),
    # The pipeline shows the transformer the window, and puts nothing back.
    "repaint": (Repaint(start=5, end=10, injection=0, blend_frames=0), WINDOW),
    "extract": (Extract(track="vocals"), {"track_name": "vocals"}),
    "lego": (Lego(track="drums", start=5, end=10), {"track_name": "drums", **WINDOW}),
    "complete": (Complete(tracks=("bass", "drums")), {"complete_track_classes": ["bass", "drums"]}),
}


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize(
    ("ours", "theirs", "scale"),
    [("model", "pipeline", 1.0), ("base_model", "base_pipeline", 1.0), ("base_model", "base_pipeline", 7.0)],
)
async def test_a_song_from_a_source_equals_that_of_diffusers(
    request: pytest.FixtureRequest, source: Source, kind: str, ours: str, theirs: str, scale: float
) -> None:
    task, options = TASKS[kind]
    song = song_of(task, source, scale=scale)
    made = make_in_diffusers(request.getfixturevalue(theirs), song, task_type=kind, src_audio=source.audio, **options)
    assert_same(await make(request.getfixturevalue(ours), song), made)


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize("codes", [(), (7, 512, 63_999, 12_345, 1, 2, 3, 4, 5, 6)])
async def test_a_guided_song_without_a_source_equals_that_of_diffusers(
    base_model: LoadedModel, base_pipeline: AceStepPipeline, scale: float, codes: tuple[int, ...]
) -> None:
    song = replace(song_of(TextToMusic(), None, scale=scale, steps=6, frames=50), codes=codes)
    made = await make(base_model, song)
    assert_same(made, make_in_diffusers(base_pipeline, song))
    if scale > 1:
        unguided = replace(song, diffusion=replace(song.diffusion, guidance=Guidance(scale=1.0)))
        assert np.abs(made - await make(base_model, unguided)).max() > 0.1


async def test_an_interval_of_guidance_is_of_times_which_diffusers_turns_round(
    base_model: LoadedModel, base_pipeline: AceStepPipeline
) -> None:
    song = song_of(TextToMusic(), None, scale=7.0, steps=6, frames=50)
    late = replace(song, diffusion=replace(song.diffusion, guidance=Guidance(scale=7.0, end=0.6)))
    made = await make(base_model, late)
    assert_same(made, make_in_diffusers(base_pipeline, song, cfg_interval_start=0.4))
    assert np.abs(made - make_in_diffusers(base_pipeline, song, cfg_interval_end=0.6)).max() > 0.1


async def test_a_cover_of_no_strength_never_sees_its_source_as_it_does_in_diffusers(
    base_model: LoadedModel, base_pipeline: AceStepPipeline, source: Source
) -> None:
    words_alone = song_of(TextToMusic(), None, scale=7.0)
    made = await make(base_model, song_of(Cover(strength=0), source, scale=7.0))
    assert np.array_equal(made, await make(base_model, words_alone))
    theirs = make_in_diffusers(
        base_pipeline, words_alone, task_type="cover", src_audio=source.audio, audio_cover_strength=0.0
    )
    assert np.abs(made - theirs).max() > 0.1


async def test_a_cover_of_its_own_codes_is_that_of_its_audio(model: LoadedModel, source: Source) -> None:
    engine = DitEngine([model], Worker("dit"), max_batch=1)

    async def whole() -> AsyncIterator[NDArray[np.float32]]:
        yield source.latents

    codes = np.concatenate([run async for run in engine.tokenize(whole())])
    engine.close()
    heard = song_of(Cover(), source)
    told = replace(heard, source=None, codes=tuple(codes.tolist()))
    assert_same(await make(model, told), await make(model, heard))


async def test_a_song_is_told_its_own_length_and_that_of_diffusers_a_minute(
    model: LoadedModel, pipeline: AceStepPipeline, source: Source
) -> None:
    song = song_of(Extract(), source)
    default = signature(AceStepPipeline.__call__).parameters["audio_duration"].default
    theirs = make_in_diffusers(pipeline, song, task_type="extract", src_audio=source.audio, audio_duration=default)
    assert_same(await make(model, replace(song, duration_s=60)), theirs)
    assert np.abs(await make(model, song) - theirs).max() > 0.01


def test_diffusers_draws_a_source_anew_every_time(pipeline: AceStepPipeline, source: Source) -> None:
    song = song_of(Extract(), source, steps=1)
    with torch.random.fork_rng(devices=[]):
        one, other = (
            _make_in_diffusers(
                pipeline,
                song,
                task_type="extract",
                src_audio=source.audio,
                generator=torch.Generator().manual_seed(1),
            )
            for _ in range(2)
        )
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("frames", [7, 55, 110, 218])
@pytest.mark.parametrize("task", [Cover(), Extract()])
async def test_a_song_is_as_long_as_its_source(model: LoadedModel, task: Task, frames: int) -> None:
    source = draw_noise(1, frames, 64).numpy()
    song = replace(song_of(task, None, steps=1, frames=frames), source=source)
    assert (await make(model, song)).shape == (frames, 64)


@pytest.mark.parametrize("num_codes", [11, 22])
def test_diffusers_has_no_song_of_some_lengths(pipeline: AceStepPipeline, num_codes: int) -> None:
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        pipeline(prompt="a", lyrics="b", audio_codes="<|audio_code_1|>" * num_codes, output_type="latent")


@pytest.mark.parametrize("task", [TextToMusic(), *SOURCE_TASKS], ids=lambda task: type(task).__name__)
async def test_a_seed_gives_the_same_latents_again_in_every_task(
    base_model: LoadedModel, source: Source, task: Task
) -> None:
    song = song_of(task, None if isinstance(task, TextToMusic) else source, scale=3.0)
    made = await make(base_model, song)
    assert made.shape == (14, 64)
    assert np.array_equal(made, await make(base_model, song))
    assert not np.array_equal(made, await make(base_model, replace(song, seed=6)))


@pytest.mark.parametrize("task", [Cover(), Repaint(start=0, end=5, injection=1, blend_frames=5), Extract(), Lego()])
async def test_a_task_without_a_source_is_made_over_silence(model: LoadedModel, task: Task) -> None:
    song = song_of(task, None)
    silence = model.silence[:14].numpy()
    assert np.array_equal(await make(model, song), await make(model, replace(song, source=silence)))
