"""Where diffusers' pipeline is wrong, shown on the same weights, beside what ours does."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from torch import nn

from soundstage.stage.v1.dit_service_pb2 import DenoiseSetup
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage_dit.request import read_song
from soundstage_dit.sampler import draw_noise
from soundstage_dit.song import Cover, Diffusion, Guidance, Repaint, TextToMusic
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import InvalidRequestError

from .test_latents import Source, assert_same, make, make_in_diffusers, song_of, source

__all__ = ["source"]  # a fixture

TURBO_TIMES = (0.97, 0.76, 0.615, 0.5, 0.395, 0.28, 0.18, 0.085, 0.0)


@contextmanager
def counting(network: nn.Module) -> Generator[list[int], None, None]:
    """Count how many songs each call of a network has."""
    calls: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append(len(args[0] if args else options["hidden_states"]))

    with network.register_forward_pre_hook(note, with_kwargs=True):
        yield calls


async def test_a_cover_switches_to_words_where_diffusers_mixes_both_at_every_step(
    model: LoadedModel, pipeline: AceStepPipeline, source: Source
) -> None:
    song = song_of(Cover(strength=0.5), source, steps=4)
    with counting(model.dit) as ours:
        await make(model, song)
    with counting(pipeline.transformer) as theirs:
        make_in_diffusers(pipeline, song, task_type="cover", src_audio=source.audio, audio_cover_strength=0.5)
    assert (len(ours), len(theirs)) == (4, 8)


async def test_outside_of_a_repaint_the_source_stays_where_diffusers_keeps_nothing(
    model: LoadedModel, pipeline: AceStepPipeline, source: Source
) -> None:
    song = song_of(Repaint(start=5, end=10, injection=1.0, blend_frames=0), source)
    window = {"repainting_start": 0.2, "repainting_end": 0.4}
    theirs = make_in_diffusers(pipeline, song, task_type="repaint", src_audio=source.audio, **window)
    ours = await make(model, song)
    outside = np.r_[0:5, 10:14]
    np.testing.assert_allclose(ours[outside], source.latents[outside], atol=1e-6)
    assert np.abs(theirs[outside] - source.latents[outside]).mean() > source.latents.std()


async def test_songs_of_unlike_words_are_each_as_alone_where_diffusers_attends_to_padding(
    model: LoadedModel, pipeline: AceStepPipeline
) -> None:
    short = song_of(TextToMusic(), None, frames=50)
    long = replace(short, lyrics="la la la\n" * 20)
    alone = make_in_diffusers(pipeline, short)
    noise = draw_noise(short.seed, 50, 64).expand(2, -1, -1)
    both = pipeline(
        prompt=[short.caption, long.caption],
        lyrics=[short.lyrics, long.lyrics],
        vocal_language=short.language,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noise,
        audio_duration=2.0,
        bpm=short.bpm,
        output_type="latent",
        return_dict=False,
    )[0]
    assert_same(await make(model, short), alone)  # and beside others it is the same to the bit: test_invariance.py
    assert np.abs(both[0].numpy() - alone).max() > 0.01 * alone.std()


def test_a_source_without_a_task_is_refused_where_diffusers_shows_it_to_the_model(
    pipeline: AceStepPipeline,
) -> None:
    song = song_of(TextToMusic(), None, frames=25)
    audio = torch.randn(2, 25 * 1920, generator=torch.Generator().manual_seed(3)) * 0.1
    heard = make_in_diffusers(pipeline, song, task_type="text2music", src_audio=audio)
    assert np.abs(heard - make_in_diffusers(pipeline, song)).max() > 0.1
    setup = DenoiseSetup(latent_frames=14, source_frames=14)
    with pytest.raises(InvalidRequestError, match="must be 0 without a task"):
        read_song(setup, variant="turbo")


async def test_a_final_time_of_nothing_is_the_end_where_diffusers_asks_the_model_once_more(
    model: LoadedModel, pipeline: AceStepPipeline
) -> None:
    setup = DenoiseSetup(latent_frames=25, options=DiffusionOptions(timesteps=TURBO_TIMES))
    song = read_song(setup, variant="turbo")
    with counting(model.dit) as ours:
        await make(model, song)
    with counting(pipeline.transformer) as theirs:
        make_in_diffusers(pipeline, song, timesteps=list(TURBO_TIMES))
    assert (len(ours), len(theirs)) == (8, 9)


def test_no_lyrics_are_no_error_in_a_batch(pipeline: AceStepPipeline) -> None:
    nothings: list[tuple[Any, type[Exception]]] = [("", IndexError), (None, TypeError)]
    for lyrics, error in nothings:
        with pytest.raises(error):
            pipeline(prompt=["a", "b"], lyrics=lyrics, audio_duration=1.0, output_type="latent")
    assert read_song(DenoiseSetup(latent_frames=14), variant="turbo").lyrics == ""


def test_each_variant_has_defaults_of_its_own_where_diffusers_has_one_for_all(
    base_pipeline: AceStepPipeline,
) -> None:
    found = signature(type(base_pipeline).__call__).parameters
    assert [found[name].default for name in ("num_inference_steps", "shift", "guidance_scale")] == [8, 3.0, 7.0]
    turbo, base = (read_song(DenoiseSetup(latent_frames=14), variant=name).diffusion for name in ("turbo", "base"))
    assert turbo == Diffusion()
    assert turbo.guidance == Guidance(scale=1.0)
    assert (base.steps, base.times[1], base.guidance) == (50, 0.98, Guidance(scale=7.0))
