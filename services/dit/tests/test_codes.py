"""Audio codes to latents, against the published values and diffusers."""

import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline

from soundstage_dit.model.codes import grid_points
from soundstage_dit.song import Song
from soundstage_dit.weights import LoadedModel

LEVELS = (8, 8, 8, 5, 5, 5)


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
    context = model.conditioner.context(Song(caption="", lyrics="", num_frames=35, seed=0, codes=codes))
    assert theirs.std() > 0.3
    torch.testing.assert_close(context[:, :64], theirs[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(context[:, 64:], torch.ones(35, 64))


@torch.inference_mode()
def test_frames_beyond_the_codes_get_silence_from_its_start(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    song = Song(caption="", lyrics="", num_frames=13, seed=0, codes=(5, 6))
    silence = pipeline.condition_encoder.silence_latent[0]
    assert torch.equal(model.conditioner.context(song)[10:, :64], silence[:3])


@torch.inference_mode()
def test_a_last_code_may_reach_beyond_the_song(model: LoadedModel) -> None:
    whole, cut = (
        model.conditioner.context(Song(caption="", lyrics="", num_frames=frames, seed=0, codes=(5, 6)))
        for frames in (10, 7)
    )
    assert torch.equal(cut, whole[:7])


@torch.inference_mode()
def test_without_codes_the_context_is_silence(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    context = model.conditioner.context(Song(caption="", lyrics="", num_frames=40, seed=0))
    assert torch.equal(context[:, :64], pipeline.condition_encoder.silence_latent[0, :40])
