"""Weights of one byte: how far they are off, how little they take, and adapters beside them."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from soundstage_budget.need import Quantization
from soundstage_device.linear import Linear
from soundstage_dit.adapter_file import adaptable
from soundstage_dit.model.adapter import Adaptation, LowRank
from soundstage_dit.model.dit import Dit
from soundstage_dit.quantization import quantize
from soundstage_dit.weights import LoadedModel

# The same weights, scaled before or after a product, in float32.
TOLERANCE = 1e-5


def quantized(model: LoadedModel, to: Quantization) -> Dit:
    """A copy with such weights."""
    dit = copy.deepcopy(model.dit)
    quantize(dit, to)
    return dit


@torch.inference_mode()
def velocity(dit: Dit, adaptations: tuple[Adaptation, ...] = ()) -> Tensor:
    """What the same song is led by."""
    source = torch.Generator().manual_seed(0)
    latents, context, words = (torch.randn(size, generator=source) for size in ((70, 64), (70, 128), (20, 64)))
    return dit([latents], torch.tensor([0.7]), [context], [dit.remember(words, adaptations)], [adaptations])[0]


def read_back(dit: Dit) -> Dit:
    """A copy whose weights are the rounded ones, in float32."""
    rounded = copy.deepcopy(dit)
    for module in rounded.modules():
        if isinstance(module, Linear):
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return rounded


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_quantised_model_computes_with_its_rounded_weights(model: LoadedModel, to: Quantization) -> None:
    dit = quantized(model, to)
    found, plain = velocity(dit), velocity(model.dit)
    torch.testing.assert_close(found, velocity(read_back(dit)), atol=TOLERANCE, rtol=TOLERANCE)
    assert 0 < (found - plain).std() < 0.1 * plain.std()


def test_int8_is_at_most_half_a_step_off(model: LoadedModel) -> None:
    rounded = read_back(quantized(model, "int8"))
    for name, weight in model.dit.named_parameters():
        step = weight.abs().flatten(1).amax(dim=1, keepdim=True) / 127.5 if weight.dim() == 2 else torch.zeros(1)
        off = (rounded.get_parameter(name) - weight).abs()
        assert (off <= 0.501 * step).all(), name


def test_fp8_keeps_three_bits_of_every_weight(model: LoadedModel) -> None:
    rounded = read_back(quantized(model, "fp8"))
    for name, weight in model.dit.named_parameters():
        smallest = weight.abs().flatten(1).amax(dim=1, keepdim=True) / 448 * 2**-9 if weight.dim() == 2 else 0
        off = (rounded.get_parameter(name) - weight).abs()
        assert (off <= 1.001 * (weight.abs() * 2**-4 + smallest)).all(), name


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_weights_of_blocks_take_a_byte_each(model: LoadedModel, to: Quantization) -> None:
    for module in quantized(model, to).modules():
        if isinstance(module, Linear):
            weight: Any = module.weight
            assert weight.qdata.nbytes == module.in_features * module.out_features
            assert weight.scale.numel() == module.out_features


def test_none_changes_nothing(model: LoadedModel) -> None:
    dit = quantized(model, "none")
    assert all(torch.equal(weight, dit.get_parameter(name)) for name, weight in model.dit.named_parameters())


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_adapters_work_beside_quantised_weights_unrounded(model: LoadedModel, to: Quantization) -> None:
    source = torch.Generator().manual_seed(1)
    deltas = {
        name: LowRank(
            down=torch.randn(2, linear.in_features, generator=source) * 0.1,
            up=torch.randn(linear.out_features, 2, generator=source) * 0.1,
        )
        for name, linear in adaptable(model.dit).items()
    }
    dit = quantized(model, to)
    assert adaptable(dit).keys() == deltas.keys()
    merged = read_back(dit)
    for name, linear in adaptable(merged).items():
        linear.weight.data += deltas[name].up @ deltas[name].down
    found = velocity(dit, (Adaptation(deltas=deltas, scale=1.0),))
    assert (found - velocity(dit)).abs().max() > 0.1
    torch.testing.assert_close(found, velocity(merged), atol=3 * TOLERANCE, rtol=TOLERANCE)
