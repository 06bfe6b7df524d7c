"""Networks that wait in the CPU's memory: the same bits as without, and no more of them on the device than planned."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from soundstage_budget.need import Offload, Quantization, need_dit
from soundstage_dit.engine import DitEngine
from soundstage_dit.model.dit import DitLayer
from soundstage_dit.models import OffloadError, load_models, offload
from soundstage_dit.quantization import quantize
from soundstage_dit.schedule import schedule
from soundstage_dit.settings import DitSettings
from soundstage_dit.size import read_size
from soundstage_dit.song import Cover, Diffusion, Guidance, Latents, Song
from soundstage_dit.weights import LoadedModel, load
from soundstage_runtime.settings import load_settings
from soundstage_runtime.worker import Worker

CPU = torch.device("cpu")  # a copy there stands for one on a card


class Card:
    """Counts what is not at home: the most bytes, and the most layers, after any call of any module."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        self._owners = [module for part in parts for module in part.modules()]
        self._homes = {id(tensor): tensor for _, tensor in self._tensors()}
        self.most_bytes = self.most_layers = 0

    def away(self) -> list[tuple[nn.Module, torch.Tensor]]:
        """What is on the card now."""
        return [(owner, tensor) for owner, tensor in self._tensors() if id(tensor) not in self._homes]

    def look(self, *_: object) -> None:
        """Count."""
        away = self.away()
        self.most_bytes = max(self.most_bytes, sum(tensor.nbytes for _, tensor in away))
        here = {id(owner) for owner, _ in away}
        layers = [owner for owner in self._owners if isinstance(owner, DitLayer) and id(owner) in here]
        self.most_layers = max(self.most_layers, len(layers))

    def _tensors(self) -> list[tuple[nn.Module, torch.Tensor]]:
        return [(owner, tensor) for owner in self._owners for tensor in owner.parameters(recurse=False)]


@contextmanager
def watching(model: LoadedModel, kind: Offload) -> Generator[Card]:
    card = Card(model.parts)
    offload([model], CPU, layers=kind == "layer")
    handle = register_module_forward_hook(card.look)
    try:
        yield card
    finally:
        handle.remove()


def fresh(folder: Path) -> LoadedModel:
    """Load a model; weights begin at whole words, as copies do: a CPU's kernels add in an order that depends on it."""
    model = load(folder, text_encoder=None, device=CPU, dtype=torch.float32)
    for part in model.parts:
        for parameter in part.parameters():
            parameter.data = parameter.data.clone()
    return model


def songs() -> list[Song]:
    """Words and codes; guidance; a source through the codes and back."""
    plain = Diffusion(times=tuple(schedule(2, 3.0)))
    guided = Diffusion(times=tuple(schedule(2, 3.0)), guidance=Guidance(scale=3.0))
    source = np.random.default_rng(0).standard_normal((40, 64), np.float32)
    return [
        Song(caption="a", lyrics="la la", num_frames=60, seed=1, codes=(1, 2, 3), diffusion=plain),
        Song(caption="b", lyrics="", num_frames=30, seed=2, diffusion=guided),
        Song(caption="c", lyrics="la", num_frames=40, seed=3, diffusion=plain, task=Cover(strength=0.5), source=source),
    ]


async def make(model: LoadedModel) -> list[Latents]:
    engine = DitEngine([model], Worker("dit"))
    try:
        made = [[event async for event in engine.denoise(song)][-1] for song in songs()]
        return [latents for latents in made if isinstance(latents, np.ndarray)]
    finally:
        engine.close()


@pytest.mark.parametrize("kind", ["model", "layer"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
async def test_the_same_bits_and_no_more_on_the_card_than_planned(
    checkpoints: Path, kind: Offload, quantization: Quantization
) -> None:
    folder = checkpoints / "original/acestep-v15-base"
    model, other = fresh(folder), fresh(folder)
    for one in (model, other):
        quantize(one.dit, quantization)
    expected = await make(other)
    with watching(model, kind) as card:
        found = await make(model)
    assert len(found) == 3
    assert all(np.array_equal(one, another) for one, another in zip(found, expected, strict=True))
    # Idle: of the transformer what stays, of all else nothing.
    staying = {owner for owner, _ in card.away()}
    assert staying <= set(model.dit.modules())
    assert any(isinstance(owner, DitLayer) for owner in staying) == (kind == "model")
    assert card.most_layers == (2 if kind == "layer" else len(model.dit.layers))
    if quantization == "none":
        size = read_size(folder, None)
        need = need_dit(
            size,
            dtype="float32",
            quantization=quantization,
            offload=kind,
            max_batch=1,
            max_duration_s=10,
            max_tokens=100,
            on_card=True,
        )
        planned = need.weights - model.silence.nbytes
        assert card.most_bytes <= planned
        assert card.most_bytes == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("folder", ["original/acestep-v15-turbo", "original/acestep-v15-xl-turbo", "pipeline-base"])
def test_the_size_is_that_of_the_networks(checkpoints: Path, folder: str) -> None:
    size, model = read_size(checkpoints / folder, None), fresh(checkpoints / folder)
    counts = [sum(tensor.numel() for tensor in part.parameters()) for part in model.parts]
    dit, code_encoder, code_decoder, text, conditions = counts
    assert size.parameters == dit
    assert size.variant == model.variant
    # Diffusers' layout has silence in it.
    silence = model.silence.numel() if folder.startswith("pipeline") else 0
    assert sum(size.beside) - silence == pytest.approx(text + conditions + code_encoder + code_decoder, rel=0.01)
    assert size.layer_parameters == pytest.approx(sum(t.numel() for t in model.dit.layers[0].parameters()), rel=0.05)


def settings_of(folder: Path, *arguments: str) -> DitSettings:
    return load_settings(DitSettings, ["--model", str(folder), *arguments])


def test_two_ways_to_leave_the_device_are_one_too_many(checkpoints: Path) -> None:
    settings = settings_of(checkpoints / "original/acestep-v15-turbo", "--offload", "layer", "--max-models-gb", "6")
    with pytest.raises(OffloadError, match=r"offload is 'layer' and max_models_gb is 6; .* leave one out"):
        load_models(settings, torch.device("cuda"), torch.float32)
