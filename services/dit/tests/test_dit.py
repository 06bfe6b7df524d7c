"""The diffusion transformer against diffusers', which pads nothing for one song at a time."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from torch import Tensor

from soundstage_device.linear import pack_linears
from soundstage_dit.model.attention import attend_in_blocks, attend_near, attend_to_all
from soundstage_dit.weights import LoadedModel

# Two independent orders of the same float32 arithmetic; outputs have deviation about 1.
TOLERANCE = 1e-5

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


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


def test_packed_weights_give_the_same_velocity(model: LoadedModel) -> None:
    packed = replace(model, dit=deepcopy(model.dit))
    pack_linears(packed.dit)
    inputs = draw_inputs(301, 30, 64, seed=0)
    latents, context, conditions = inputs
    found, wanted = (velocity(one, latents, 0.5, context, conditions) for one in (packed, model))
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)


def naive(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attention as its formula says it."""
    length, groups = queries.shape[1], len(queries) // len(keys)
    scores = queries @ keys.repeat_interleave(groups, dim=0).mT / queries.shape[-1] ** 0.5
    if window is not None:
        distance = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs()
        scores = scores.masked_fill(distance > window, -torch.inf)
    return scores.softmax(dim=-1) @ values.repeat_interleave(groups, dim=0)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 30, 127, 128, 129, 300])
@pytest.mark.parametrize("attend", [attend_near, attend_in_blocks])
def test_near_attention_sees_exactly_its_window(length: int, attend: Attend) -> None:
    window = 4
    source = torch.Generator().manual_seed(length)
    queries = torch.randn(4, length, 8, generator=source)
    keys, values = torch.randn(2, 2, length, 8, generator=source)
    wanted = naive(queries, keys, values, window)
    torch.testing.assert_close(attend(queries, keys, values, window), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("length", "num_keys"), [(1, 1), (5, 300), (128, 1), (300, 17), (257, 257)])
def test_both_ways_to_attend_to_all_are_the_formula(length: int, num_keys: int) -> None:
    source = torch.Generator().manual_seed(length)
    queries = torch.randn(4, length, 8, generator=source)
    keys, values = torch.randn(2, 2, num_keys, 8, generator=source)
    wanted = naive(queries, keys, values, None)
    torch.testing.assert_close(attend_to_all(queries, keys, values), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(attend_in_blocks(queries, keys, values, None), wanted, atol=1e-6, rtol=1e-6)


def test_one_condition_stands_for_any_number_of_the_same() -> None:
    # So guidance can leave out words by attending to a single vector.
    source = torch.Generator().manual_seed(0)
    queries, key, value = (torch.randn(heads, count, 8, generator=source) for heads, count in ((4, 90), (2, 1), (2, 1)))
    one = attend_in_blocks(queries, key, value, None)
    many = attend_in_blocks(queries, key.expand(-1, 300, -1), value.expand(-1, 300, -1), None)
    torch.testing.assert_close(one, value.repeat_interleave(2, dim=0).expand(-1, 90, -1), atol=0, rtol=0)
    # Three hundred shares of a 300th do not add up to 1 to the last bit.
    torch.testing.assert_close(one, many, atol=TOLERANCE, rtol=TOLERANCE)
