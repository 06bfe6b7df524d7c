"""Whole songs against diffusers' pipeline: prompts, encoders, context, transformer and sampler together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from numpy.typing import NDArray

from soundstage_dit.engine import DitEngine
from soundstage_dit.sampler import draw_noise, schedule
from soundstage_dit.song import Diffusion, Song
from soundstage_dit.weights import LoadedModel, load
from soundstage_runtime.worker import Worker


async def make(model: LoadedModel, song: Song) -> NDArray[np.float32]:
    """The latents of one song alone."""
    engine = DitEngine(model, Worker("dit"), max_batch=1)
    *_, latents = [event async for event in engine.denoise(song)]
    engine.close()
    assert isinstance(latents, np.ndarray)
    return latents


def make_in_diffusers(pipe: AceStepPipeline, song: Song, *, shift: float = 3.0) -> NDArray[np.float32]:
    """The same song from the pipeline, with our noise."""
    made = pipe(
        prompt=song.caption,
        lyrics=song.lyrics,
        audio_duration=song.num_frames / 25,
        vocal_language=song.language,
        num_inference_steps=song.diffusion.steps,
        guidance_scale=1.0,
        shift=shift,
        latents=draw_noise(song.seed, song.num_frames, 64)[None],
        output_type="latent",
        bpm=song.bpm,
        keyscale=song.key_scale,
        timesignature=song.time_signature,
        audio_codes="".join(f"<|audio_code_{code}|>" for code in song.codes) or None,
        return_dict=False,
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


async def test_bfloat16_stays_near_float32(checkpoints: Path, model: LoadedModel) -> None:
    rounded = load(
        checkpoints / "original/acestep-v15-turbo", text_encoder=None, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    song = Song(caption="a", lyrics="b", num_frames=100, seed=9, codes=tuple(range(20)))
    exact = await make(model, song)
    error = await make(rounded, song) - exact
    # 8 bits of mantissa err by 2^-9 an operation; a wrong position or time would err by the size of the signal.
    assert error.std() < 0.1 * exact.std()
