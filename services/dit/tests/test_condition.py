"""The condition encoder against diffusers', and where the XL models want something else."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from torch import Tensor

from soundstage_dit.model.condition import ConditionEncoder, TimbreEncoder
from soundstage_dit.song import Song
from soundstage_dit.weights import LoadedModel

TOLERANCE = 1e-5  # float32, two orders of the same arithmetic, outputs of deviation about 1
TEXT_WIDTH = 48


def draw(tokens: int, width: int, seed: int) -> Tensor:
    """A random [tokens, width]."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def encoder_of(model: LoadedModel) -> ConditionEncoder:
    """The condition encoder of a loaded model."""
    return model.conditioner._condition_encoder  # pyright: ignore[reportPrivateUsage]


@torch.inference_mode()
def reference_conditions(
    pipe: AceStepPipeline, texts: list[Tensor], lyrics: list[Tensor], references: list[Tensor]
) -> list[Tensor]:
    """What diffusers' encoder makes of a padded batch, cut back to each item's own conditions."""
    text_mask, lyric_mask = (
        torch.nn.utils.rnn.pad_sequence([torch.ones(len(x)) for x in items], batch_first=True).bool()
        for items in (texts, lyrics)
    )
    packed, mask = pipe.condition_encoder(
        text_hidden_states=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
        text_attention_mask=text_mask,
        lyric_hidden_states=torch.nn.utils.rnn.pad_sequence(lyrics, batch_first=True),
        lyric_attention_mask=lyric_mask,
        refer_audio_acoustic_hidden_states_packed=torch.stack(references),
        refer_audio_order_mask=torch.arange(len(references)),
    )
    return [row[keep] for row, keep in zip(packed, mask, strict=True)]


def test_conditions_equal_those_of_a_padded_batch_in_diffusers(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    texts = [draw(tokens, TEXT_WIDTH, seed=tokens) for tokens in (20, 3, 61)]
    lyrics = [draw(tokens, TEXT_WIDTH, seed=tokens) for tokens in (90, 140, 1)]
    references = [draw(750, 64, seed=item) for item in range(3)]
    theirs = reference_conditions(pipeline, texts, lyrics, references)
    for item, expected in enumerate(theirs):
        with torch.inference_mode():
            ours = encoder_of(model)(texts[item], lyrics[item], [references[item]])
        assert len(ours) == len(lyrics[item]) + 1 + len(texts[item])
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_only_the_timbre_differs_in_an_xl_model(xl_model: LoadedModel, xl_pipeline: AceStepPipeline) -> None:
    text, lyrics, reference = draw(20, TEXT_WIDTH, seed=1), draw(50, TEXT_WIDTH, seed=2), draw(750, 64, seed=3)
    with torch.inference_mode():
        ours = encoder_of(xl_model)(text, lyrics, [reference])
    theirs = reference_conditions(xl_pipeline, [text], [lyrics], [reference])[0]
    different = (ours - theirs).abs().amax(dim=-1) > 1e-4
    assert different.nonzero().flatten().tolist() == [len(lyrics)]


@torch.inference_mode()
def test_an_xl_timbre_is_what_diffusers_layers_make_of_the_leading_token(
    xl_model: LoadedModel, xl_pipeline: AceStepPipeline
) -> None:
    reference = draw(750, 64, seed=4)
    timbre = deepcopy(xl_pipeline.condition_encoder.timbre_encoder)
    token, embed = timbre.special_token, timbre.embed_tokens
    embedded = torch.cat([token, embed(reference[None])], dim=1)
    timbre.embed_tokens = torch.nn.Identity()
    expected, _ = timbre(embedded, torch.zeros(1, dtype=torch.long))
    ours = encoder_of(xl_model).timbre_encoder(reference)
    torch.testing.assert_close(ours, expected[0], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("fixture", "is_read"), [("model", False), ("xl_model", True)])
@torch.inference_mode()
def test_the_timbre_token_is_read_by_xl_models_alone(
    request: pytest.FixtureRequest, fixture: str, is_read: bool
) -> None:
    loaded: LoadedModel = request.getfixturevalue(fixture)
    reference = draw(750, 64, seed=5)
    timbre: TimbreEncoder = deepcopy(encoder_of(loaded).timbre_encoder)
    before = timbre(reference)
    timbre.special_token.neg_()
    assert (not torch.equal(timbre(reference), before)) is is_read


@torch.inference_mode()
def test_a_songs_conditions_are_its_words_and_750_frames_of_silence(
    model: LoadedModel, pipeline: AceStepPipeline
) -> None:
    song = Song(caption="a drum", lyrics="la la", num_frames=10, seed=0, language="en", duration_s=60)
    text, _, lyrics, _ = pipeline.encode_prompt(song.caption, song.lyrics, torch.device("cpu"), audio_duration=60)
    silence = pipeline.condition_encoder.silence_latent[0, :750]
    theirs = reference_conditions(pipeline, [text[0]], [lyrics[0]], [silence])[0]
    torch.testing.assert_close(model.conditioner.encode(song), theirs, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_every_reference_gives_a_timbre_between_lyrics_and_text(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    text, lyrics = draw(20, TEXT_WIDTH, seed=1), draw(50, TEXT_WIDTH, seed=2)
    references = [draw(750, 64, seed=seed) for seed in (3, 4, 5)]
    theirs, mask = pipeline.condition_encoder(
        text_hidden_states=text[None],
        text_attention_mask=torch.ones(1, 20).bool(),
        lyric_hidden_states=lyrics[None],
        lyric_attention_mask=torch.ones(1, 50).bool(),
        refer_audio_acoustic_hidden_states_packed=torch.stack(references),
        refer_audio_order_mask=torch.zeros(3, dtype=torch.long),
    )
    ours = encoder_of(model)(text, lyrics, references)
    assert mask.all()
    assert len(ours) == 50 + 3 + 20
    torch.testing.assert_close(ours, theirs[0], atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_a_songs_references_take_the_place_of_silence(model: LoadedModel) -> None:
    reference = draw(750, 64, seed=5).numpy()
    song = Song(caption="a drum", lyrics="la la", num_frames=10, seed=0)
    silent = model.conditioner.encode(song)
    heard = model.conditioner.encode(replace(song, references=(reference,)))
    different = (silent != heard).any(dim=-1).nonzero().flatten().tolist()
    assert len(different) == 1
    twice = model.conditioner.encode(replace(song, references=(reference, reference)))
    [place] = different
    assert torch.equal(twice[place], heard[place])
    assert torch.equal(twice[place + 1 :], heard[place:])
