"""Halves that wait in the CPU's memory: the same bits as without, and no more of them on the device than planned."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from soundstage_budget.need import need_vae
from soundstage_device.worker import DeviceMemoryError
from soundstage_vae.codec import Codec
from soundstage_vae.size import read_size

CPU = torch.device("cpu")  # a copy there stands for one on a card
LATENTS = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
AUDIO = np.random.default_rng(2).uniform(-0.5, 0.5, (8000, 2)).astype(np.float32)


class Card:
    """Counts what is not at home: the most bytes after any call of any module."""

    def __init__(self, codec: Codec) -> None:
        self._owners = [module for half in (codec.encoder, codec.decoder) for module in half.modules()]
        self._homes = {id(tensor): tensor for tensor in self._tensors()}
        self.most_bytes = 0

    def count(self) -> int:
        """How many bytes are on the card now."""
        return sum(tensor.nbytes for tensor in self._tensors() if id(tensor) not in self._homes)

    def look(self, *_: object) -> None:
        """Count."""
        self.most_bytes = max(self.most_bytes, self.count())

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for owner in self._owners for tensor in owner.parameters(recurse=False)]


@pytest.fixture
def offloaded(tiny_vae: Path) -> Codec:
    return Codec(tiny_vae, device=CPU, dtype=torch.float32, is_offloaded=True)


def test_the_same_bits_and_one_half_on_the_card_at_most(tiny_vae: Path, codec: Codec, offloaded: Codec) -> None:
    card = Card(offloaded)
    handle = register_module_forward_hook(card.look)
    try:
        found = [offloaded.decode(LATENTS), *offloaded.encode(AUDIO)]
    finally:
        handle.remove()
    expected = [codec.decode(LATENTS), *codec.encode(AUDIO)]
    assert all(np.array_equal(one, another) for one, another in zip(found, expected, strict=True))
    assert card.count() == 0
    need = need_vae(
        read_size(tiny_vae),
        dtype="float32",
        window_frames=64,
        max_batch=1,
        max_duration_s=10,
        offload="model",
        on_card=True,
    )
    assert 0.95 * need.weights <= card.most_bytes <= need.weights


def test_a_half_that_has_no_room_is_run_on_the_host(codec: Codec, offloaded: Codec) -> None:
    def fail(module: nn.Module, _arguments: object) -> None:
        if module is offloaded.decoder:
            raise torch.OutOfMemoryError("CUDA out of memory")

    card = Card(offloaded)
    handle = nn.modules.module.register_module_forward_pre_hook(fail)
    try:
        samples = offloaded.decode(LATENTS)
    finally:
        handle.remove()
    assert card.count() == card.most_bytes == 0
    np.testing.assert_allclose(samples, codec.decode(LATENTS), rtol=0, atol=1e-6)


def test_a_failure_leaves_nothing_on_the_card(offloaded: Codec) -> None:
    def fail(_module: nn.Module, _arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    card = Card(offloaded)
    offloaded.encoder.head.register_forward_pre_hook(fail)
    with pytest.raises(DeviceMemoryError):
        offloaded.encode(AUDIO)
    assert card.count() == 0


def test_snakes_are_compiled_for_weights_that_come_and_go(codec: Codec, offloaded: Codec) -> None:
    assert offloaded.compile_snakes("aot_eager")
    np.testing.assert_allclose(offloaded.decode(LATENTS), codec.decode(LATENTS), rtol=0, atol=1e-5)
