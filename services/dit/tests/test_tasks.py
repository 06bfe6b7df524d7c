"""What every task shows the transformer: the source, the mask, and other words where it has any."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from torch import Tensor

from soundstage_dit.sampler import draw_noise
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
from soundstage_dit.tasks import SourceError, prepare, silence_of
from soundstage_dit.trajectory import Conditions, Prepared
from soundstage_dit.weights import LoadedModel

SOURCE = draw_noise(4, 100, 64)
WINDOW = slice(25, 50)
REPAINT = Repaint(start=25, end=50, injection=0.5, blend_frames=12)
EDIT = Edit(source_caption="a harp", source_lyrics="lo lo")


def song_of(task: Task, *, scale: float = 1.0, is_mask_explicit: bool = True) -> Song:
    """A song of 100 frames over SOURCE."""
    return Song(
        caption="a drum",
        lyrics="la la",
        num_frames=100,
        seed=0,
        task=task,
        source=SOURCE.numpy(),
        diffusion=Diffusion(guidance=Guidance(scale=scale), is_mask_explicit=is_mask_explicit),
    )


@torch.inference_mode()
def prepared_of(model: LoadedModel, song: Song) -> Prepared:
    """All that is prepared for a song."""
    return prepare(song, model)


def shown(model: LoadedModel, song: Song) -> tuple[Tensor, Tensor]:
    """What the transformer is shown of the source, and the mask, each [frames, 64]."""
    source, mask = prepared_of(model, song).conditional.context.chunk(2, dim=-1)
    return source, mask


def silence(model: LoadedModel) -> Tensor:
    """As much silence as there is song."""
    return model.silence[:100]


def assert_masked(mask: Tensor, window: slice) -> None:
    """1 in the window, 0 elsewhere."""
    expected = torch.zeros(100, 64)
    expected[window] = 1
    assert torch.equal(mask, expected)


def assert_same_conditions(ours: Conditions | None, expected: Conditions) -> None:
    """Equal to the bit."""
    assert ours is not None
    assert torch.equal(ours.context, expected.context)
    assert torch.equal(ours.memory, expected.memory)


def test_a_repaint_is_shown_silence_in_its_window_and_the_source_elsewhere(model: LoadedModel) -> None:
    source, mask = shown(model, song_of(REPAINT))
    expected = SOURCE.clone()
    expected[WINDOW] = silence(model)[WINDOW]
    assert torch.equal(source, expected)
    assert_masked(mask, WINDOW)


def test_a_lego_is_shown_the_source_in_its_window_too(model: LoadedModel) -> None:
    source, mask = shown(model, song_of(Lego(start=25, end=50)))
    assert torch.equal(source, SOURCE)
    assert_masked(mask, WINDOW)


@pytest.mark.parametrize(
    "task", [Cover(from_latents=True), Extract(), Lego(), Complete(), replace(EDIT, context="latents")]
)
def test_a_task_of_the_whole_is_shown_the_source_as_it_is(model: LoadedModel, task: Task) -> None:
    source, mask = shown(model, song_of(task))
    assert torch.equal(source, SOURCE)
    assert_masked(mask, slice(None))


@pytest.mark.parametrize("task", [REPAINT, Lego(start=25, end=50), Extract(), Cover(), TextToMusic()])
def test_a_mask_left_to_the_model_is_2_everywhere(model: LoadedModel, task: Task) -> None:
    explicit, _ = shown(model, song_of(task))
    source, mask = shown(model, song_of(task, is_mask_explicit=False))
    assert torch.equal(mask, torch.full((100, 64), 2.0))
    assert torch.equal(source, explicit)


@pytest.mark.parametrize("task", [Cover(), replace(EDIT, context="codes")])
@torch.inference_mode()
def test_a_melody_is_the_source_sent_through_diffusers_codes_and_back(
    model: LoadedModel, pipeline: AceStepPipeline, task: Task
) -> None:
    song = replace(song_of(task), num_frames=98, source=SOURCE[:98].numpy())
    source, _ = shown(model, song)
    quantized, _ = pipeline.audio_tokenizer.tokenize(SOURCE[None, :98], pipeline.condition_encoder.silence_latent)
    expected = pipeline.audio_token_detokenizer(quantized)[0, :98]
    torch.testing.assert_close(source, expected, atol=1e-5, rtol=1e-5)


def test_an_edit_is_shown_silence_unless_it_asks_for_more(model: LoadedModel) -> None:
    source, mask = shown(model, song_of(EDIT))
    assert torch.equal(source, silence(model))
    assert_masked(mask, slice(None))


@pytest.mark.parametrize("task", [Cover(), Cover(from_latents=True)])
def test_codes_win_over_a_source(model: LoadedModel, task: Cover) -> None:
    codes = tuple(range(20))
    both = prepared_of(model, replace(song_of(task), codes=codes))
    alone = prepared_of(model, replace(song_of(task), codes=codes, source=None))
    assert torch.equal(both.conditional.context, alone.conditional.context)
    assert both.source is not None
    # What a cover begins with, where it begins with its source.
    assert torch.equal(both.source, both.conditional.context[:, :64])


@pytest.mark.parametrize("task", [Cover(noise_strength=0.5), REPAINT, EDIT])
def test_what_is_kept_of_a_source_is_not_rounded(model: LoadedModel, task: Task) -> None:
    source = prepared_of(model, song_of(task)).source
    assert source is not None
    assert torch.equal(source, SOURCE)
    silent = prepared_of(model, replace(song_of(task), source=None)).source
    assert silent is not None
    assert torch.equal(silent, silence(model))


@pytest.mark.parametrize("is_mask_explicit", [True, False])
def test_a_cover_goes_on_as_a_song_from_its_words_and_its_timbre(model: LoadedModel, is_mask_explicit: bool) -> None:
    references = (draw_noise(5, 750, 64).numpy(),)
    cover = replace(song_of(Cover(strength=0.5), scale=7, is_mask_explicit=is_mask_explicit), references=references)
    words = prepared_of(model, replace(cover, task=TextToMusic(), source=None))
    prepared = prepared_of(model, cover)
    assert_same_conditions(prepared.words, words.conditional)
    assert words.unconditional is not None
    assert_same_conditions(prepared.words_unconditional, words.unconditional)
    of_codes = prepared_of(model, replace(cover, source=None, codes=(1, 2, 3)))
    assert_same_conditions(of_codes.words, words.conditional)


def test_a_cover_that_follows_to_the_end_needs_no_other_words(model: LoadedModel) -> None:
    prepared = prepared_of(model, song_of(Cover(), scale=7))
    assert (prepared.words, prepared.words_unconditional) == (None, None)


def test_an_edit_starts_from_the_sources_own_words_in_the_same_context(model: LoadedModel) -> None:
    prepared = prepared_of(model, song_of(EDIT))
    expected = prepared_of(model, replace(song_of(EDIT), caption="a harp", lyrics="lo lo"))
    assert_same_conditions(prepared.told, expected.conditional)


def test_an_unguided_song_has_nothing_to_move_away_from(model: LoadedModel) -> None:
    assert prepared_of(model, song_of(TextToMusic())).unconditional is None


@torch.inference_mode()
def test_no_words_once_are_the_same_as_no_words_in_every_place(base_model: LoadedModel) -> None:
    guided = prepared_of(base_model, song_of(Extract(), scale=7))
    assert guided.unconditional is not None
    assert torch.equal(guided.unconditional.context, guided.conditional.context)
    num_words = guided.conditional.memory.shape[-2]
    everywhere = base_model.dit.remember(base_model.null_condition.expand(num_words, -1))
    once, many = (
        base_model.dit([SOURCE], torch.tensor([0.7]), [guided.unconditional.context], [memory])[0]
        for memory in (guided.unconditional.memory, everywhere)
    )
    assert num_words > 20
    # float32 noise of one forward.
    torch.testing.assert_close(once, many, atol=1e-5, rtol=1e-5)


def test_silence_begins_anew_where_it_ends(model: LoadedModel) -> None:
    long = silence_of(model, 15_003)
    assert torch.equal(long[:15_000], model.silence)
    assert torch.equal(long[15_000:], model.silence[:3])


@torch.inference_mode()
def test_a_source_too_large_for_the_codes_is_refused(model: LoadedModel) -> None:
    song = replace(song_of(Cover()), source=np.full((100, 64), 3e38, np.float32))
    with pytest.raises(SourceError, match="the source's codes are not finite"):
        prepare(song, model)
