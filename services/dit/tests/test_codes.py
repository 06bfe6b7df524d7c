"""Audio codes to latents and back, against the published values and diffusers."""

import copy

import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline

from soundstage_dit.model.codes import grid_points, nearest_codes
from soundstage_dit.song import Song
from soundstage_dit.tasks import context_of, source_of
from soundstage_dit.weights import LoadedModel

LEVELS = (8, 8, 8, 5, 5, 5)


def made_over(model: LoadedModel, song: Song) -> torch.Tensor:
    """What a song is made over, and its mask."""
    return context_of(song, source_of(song, model), model)


def test_codes_are_points_of_the_grid() -> None:
    expected = {
        0: [-1.0] * 6,
        1: [-0.714286, -1, -1, -1, -1, -1],
        512: [-1, -1, -1, -0.5, -1, -1],
        12345: [-0.714286, 1, -1, 1, 1, -1],
        31999: [1, 1, -0.142857, 0, 0, 0],
        63999: [1.0] * 6,
    }
    points = grid_points(torch.tensor(list(expected)), LEVELS)
    torch.testing.assert_close(points, torch.tensor(list(expected.values())), atol=1e-6, rtol=0)


def test_all_codes_are_different_points_and_equal_those_of_diffusers(pipeline: AceStepPipeline) -> None:
    codes = torch.arange(64_000)
    points = grid_points(codes, LEVELS)
    theirs = pipeline.audio_tokenizer.quantizer.get_codes_from_indices(codes[:, None, None])[0, :, 0]
    assert torch.equal(points, theirs)
    back = ((points + 1) / 2 * (torch.tensor(LEVELS) - 1)).round().long() @ torch.tensor([1, 8, 64, 512, 2560, 12800])
    assert torch.equal(back, codes)


@torch.inference_mode()
def test_hints_equal_those_of_diffusers(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    codes = (0, 1, 512, 12345, 31999, 63999, 7)
    text = "".join(f"<|audio_code_{code}|>" for code in codes)
    theirs, _ = pipeline.prepare_src_latents(torch.device("cpu"), torch.float32, 1, audio_codes=text)
    context = made_over(model, Song(caption="", lyrics="", num_frames=35, seed=0, codes=codes))
    assert theirs.std() > 0.3
    torch.testing.assert_close(context[:, :64], theirs[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(context[:, 64:], torch.ones(35, 64))


@torch.inference_mode()
def test_frames_beyond_the_codes_get_silence_from_its_start(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    song = Song(caption="", lyrics="", num_frames=13, seed=0, codes=(5, 6))
    silence = pipeline.condition_encoder.silence_latent[0]
    assert torch.equal(made_over(model, song)[10:, :64], silence[:3])


@torch.inference_mode()
def test_a_last_code_may_reach_beyond_the_song(model: LoadedModel) -> None:
    whole, cut = (
        made_over(model, Song(caption="", lyrics="", num_frames=frames, seed=0, codes=(5, 6))) for frames in (10, 7)
    )
    assert torch.equal(cut, whole[:7])


@torch.inference_mode()
def test_without_codes_the_context_is_silence(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    context = made_over(model, Song(caption="", lyrics="", num_frames=40, seed=0))
    assert torch.equal(context[:, :64], pipeline.condition_encoder.silence_latent[0, :40])


def draw_latents(frames: int, seed: int = 0) -> torch.Tensor:
    """Latents [frames, 64] as wide as real ones."""
    return torch.randn(frames, 64, generator=torch.Generator().manual_seed(seed))


def test_every_point_of_the_grid_is_nearest_to_its_own_code() -> None:
    codes = torch.arange(64_000)
    assert torch.equal(nearest_codes(grid_points(codes, LEVELS), LEVELS), codes)


def test_points_off_the_grid_go_to_their_nearest_and_stay_in_the_codebook() -> None:
    codes = torch.arange(64_000)
    points = grid_points(codes, LEVELS)
    # Two points of the grid are 2/7 or more apart.
    off = (torch.rand(points.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * (0.99 / 7)
    assert torch.equal(nearest_codes(points + off, LEVELS), codes)
    assert nearest_codes(torch.tensor([[-9.0] * 6, [9.0] * 6]), LEVELS).tolist() == [0, 63_999]


def test_points_that_are_not_finite_have_no_code() -> None:
    points = torch.zeros(3, 6)
    points[1, 5], points[2, 0] = torch.nan, torch.inf
    assert nearest_codes(points, LEVELS).tolist()[1:] == [-1, -1]


@pytest.mark.parametrize("frames", [*range(1, 24), 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_codes_equal_those_of_diffusers(
    model: LoadedModel, pipeline: AceStepPipeline, frames: int, dtype: torch.dtype
) -> None:
    latents, silence = draw_latents(frames, seed=frames), pipeline.condition_encoder.silence_latent
    theirs = copy.deepcopy(pipeline.audio_tokenizer).to(dtype)
    _, expected = theirs.tokenize(latents[None].to(dtype), silence)
    codes = copy.deepcopy(model.code_encoder).to(dtype)(latents, model.silence.to(dtype))
    assert codes.tolist() == expected.flatten().tolist()
    assert len(codes) == -(-frames // 5)


@torch.inference_mode()
def test_xl_codes_equal_those_of_diffusers(xl_model: LoadedModel, xl_pipeline: AceStepPipeline) -> None:
    latents = draw_latents(203)
    _, expected = xl_pipeline.audio_tokenizer.tokenize(latents[None], xl_pipeline.condition_encoder.silence_latent)
    assert xl_model.code_encoder(latents, xl_model.silence).tolist() == expected.flatten().tolist()


@torch.inference_mode()
def test_codes_follow_the_latents(model: LoadedModel) -> None:
    codes = model.code_encoder(draw_latents(1000), model.silence)
    assert len(set(codes.tolist())) > 100
    assert 0 <= codes.min() < 10_000 < 50_000 < codes.max() < 64_000


@torch.inference_mode()
def test_a_last_code_is_filled_up_with_silence_from_its_start(model: LoadedModel) -> None:
    latents = draw_latents(12)
    filled = torch.cat([latents, model.silence[:3]])
    assert torch.equal(model.code_encoder(latents, model.silence), model.code_encoder(filled, model.silence))
    zeros = torch.cat([latents, torch.zeros(3, 64)])
    assert not torch.equal(model.code_encoder(zeros, model.silence), model.code_encoder(filled, model.silence))


@torch.inference_mode()
def test_a_code_hears_its_own_frames_alone(model: LoadedModel) -> None:
    latents = draw_latents(50)
    poisoned = latents.clone()
    poisoned[5:10] = torch.nan
    codes, expected = (model.code_encoder(x, model.silence).tolist() for x in (poisoned, latents))
    assert codes == [expected[0], -1, *expected[2:]]
