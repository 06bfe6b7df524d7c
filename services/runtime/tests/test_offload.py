"""Weights that come to a device in pieces: they are there when they are used, and as few as may be."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from soundstage_device.offload import Piece, come_when_called, relay

CPU = torch.device("cpu")  # a copy there stands for one on a card


class Noting(Piece):
    """A piece that notes what happens to it."""

    def __init__(self, module: nn.Module, name: str, notes: list[str]) -> None:
        super().__init__(module.modules(), CPU)
        self._name, self._notes = name, notes

    def take(self) -> None:
        self._notes.append(f"take {self._name}")
        super().take()

    def arrive(self) -> None:
        self._notes.append(f"arrive {self._name}")

    def send(self) -> None:
        self._notes.append(f"send {self._name}")
        super().send()


def make_layers(count: int) -> tuple[list[nn.Linear], dict[nn.Module, Piece], list[str]]:
    layers, notes = [nn.Linear(2, 2).requires_grad_(False) for _ in range(count)], list[str]()
    return layers, {layer: Noting(layer, str(number), notes) for number, layer in enumerate(layers)}, notes


def test_each_comes_one_ahead_of_its_use_and_leaves_after_it() -> None:
    layers, pieces, notes = make_layers(3)
    for number, layer in enumerate(relay(layers, pieces)):
        notes.append(f"use {number}")
        assert layer is layers[number]
    assert notes == [
        *("take 0", "take 1", "arrive 0", "use 0", "send 0"),
        *("take 2", "arrive 1", "use 1", "send 1"),
        *("arrive 2", "use 2", "send 2"),
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_no_more_than_two_are_there(count: int) -> None:
    layers, pieces, _ = make_layers(count)
    homes = [layer.weight for layer in layers]

    def there() -> list[int]:
        return [n for n, (layer, home) in enumerate(zip(layers, homes, strict=True)) if layer.weight is not home]

    for number, layer in enumerate(relay(layers, pieces)):
        assert there() == [place for place in (number, number + 1) if place < count]
        assert torch.equal(layer.weight, homes[number])
        assert layer.weight.data_ptr() != homes[number].data_ptr()
    assert there() == []


def test_whoever_breaks_off_leaves_nothing_there() -> None:
    layers, pieces, _ = make_layers(4)
    homes = [layer.weight for layer in layers]
    walk = relay(layers, pieces)
    next(walk)
    next(walk)
    walk.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(layer.weight is home for layer, home in zip(layers, homes, strict=True))


class Full(Piece):
    """A piece that the device has room for in part."""

    def __init__(self, module: nn.Module, *, copies: int) -> None:
        super().__init__(module.modules(), CPU)
        self._copies = copies

    def _copy(self, tensor: Tensor) -> Tensor:
        self._copies -= 1
        if self._copies < 0:
            raise torch.OutOfMemoryError
        return tensor.clone()


def test_a_piece_that_has_no_room_leaves_nothing_there() -> None:
    layers, pieces, _ = make_layers(3)
    pieces[layers[1]] = Full(layers[1], copies=1)
    homes = [(layer.weight, layer.bias) for layer in layers]
    with pytest.raises(torch.OutOfMemoryError):
        list(relay(layers, pieces))
    assert all(
        (layer.weight is w, layer.bias is b) == (True, True) for layer, (w, b) in zip(layers, homes, strict=True)
    )


def fail(*_: object) -> Tensor:
    raise ValueError("no such song")


@pytest.mark.parametrize("work", [torch.relu, fail])
@torch.inference_mode()
def test_a_network_is_there_while_it_is_called_only(work: Callable[[Tensor], Tensor]) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
            self.shift: Tensor
            self.register_buffer("shift", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            assert self.weight is not home
            assert self.shift is not shift
            return work(x * self.weight + self.shift)

    network = Network()
    home, shift = network.weight, network.shift
    come_when_called(network, Piece([network], CPU))
    if work is fail:
        with pytest.raises(ValueError, match="no such song"):
            network(torch.ones(3))
    else:
        assert network(torch.ones(3)).tolist() == [2, 2, 2]
    assert (network.weight is home, network.shift is shift) == (True, True)
