"""The diffusion transformer against diffusers', which pads nothing for one song at a time."""

import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from torch import Tensor

from soundstage_dit.model.attention import attend_near
from soundstage_dit.weights import LoadedModel

# Two independent orders of the same float32 arithmetic; outputs have deviation about 1.
TOLERANCE = 1e-5


def draw_inputs(frames: int, conditions: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [frames, 64], context [frames, 128], conditions [conditions, width]."""
    source = torch.Generator().manual_seed(seed)
    return (
        torch.randn(frames, 64, generator=source),
        torch.randn(frames, 128, generator=source),
        torch.randn(conditions, width, generator=source),
    )


@torch.inference_mode()
def velocity(model: LoadedModel, latents: Tensor, time: float, context: Tensor, conditions: Tensor) -> Tensor:
    """One song's velocity from our transformer."""
    return model.dit([latents], torch.tensor([time]), [context], [model.dit.remember(conditions)])[0]


@torch.inference_mode()
def reference_velocity(
    pipe: AceStepPipeline, latents: Tensor, time: float, context: Tensor, conditions: Tensor
) -> Tensor:
    """The same from diffusers' transformer."""
    at = torch.tensor([time])
    return pipe.transformer(
        hidden_states=latents[None],
        timestep=at,
        timestep_r=at,
        encoder_hidden_states=conditions[None],
        context_latents=context[None],
        return_dict=False,
    )[0][0]


# The window is 16 tokens, 32 frames, to either side: the longer ones reach far beyond it.
@pytest.mark.parametrize("frames", [1, 2, 7, 31, 32, 33, 64, 65, 66, 218, 501])
def test_a_velocity_equals_that_of_diffusers(model: LoadedModel, pipeline: AceStepPipeline, frames: int) -> None:
    inputs = draw_inputs(frames, 30, 64, seed=frames)
    for time in (1.0, 0.3):
        latents, context, conditions = inputs
        ours = velocity(model, latents, time, context, conditions)
        theirs = reference_velocity(pipeline, latents, time, context, conditions)
        assert ours.std() > 0.3
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("frames", [7, 218])
def test_a_wide_model_with_narrow_conditions_equals_that_of_diffusers(
    xl_model: LoadedModel, xl_pipeline: AceStepPipeline, frames: int
) -> None:
    latents, context, conditions = draw_inputs(frames, 30, 64, seed=frames)
    ours = velocity(xl_model, latents, 0.75, context, conditions)
    theirs = reference_velocity(xl_pipeline, latents, 0.75, context, conditions)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


def test_time_changes_the_velocity(model: LoadedModel) -> None:
    latents, context, conditions = draw_inputs(50, 10, 64, seed=0)
    early, late = (velocity(model, latents, time, context, conditions) for time in (1.0, 0.3))
    assert (early - late).abs().max() > 0.1


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 30])
def test_near_attention_sees_exactly_its_window(length: int) -> None:
    window = 4
    source = torch.Generator().manual_seed(length)
    queries = torch.randn(4, length, 8, generator=source)
    keys, values = torch.randn(2, 2, length, 8, generator=source)
    distance = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs()
    scores = queries @ keys.repeat_interleave(2, dim=0).mT / 8**0.5
    scores = scores.masked_fill(distance > window, -torch.inf)
    dense = scores.softmax(dim=-1) @ values.repeat_interleave(2, dim=0)
    torch.testing.assert_close(attend_near(queries, keys, values, window), dense, atol=1e-6, rtol=1e-6)
