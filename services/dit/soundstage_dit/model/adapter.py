"""What adapters add to linear layers: beside the weights, and only to the tokens of the songs that ask for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """A change of weights, up @ down; the adapter's own scale is in `up`."""

    down: Tensor  # [rank, inputs]
    up: Tensor  # [outputs, rank]

    @property
    def size_bytes(self) -> int:
        """The memory it takes."""
        return self.down.nbytes + self.up.nbytes

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Return the same change on a device, in a dtype."""
        return type(self)(down=self.down.to(device, dtype), up=self.up.to(device, dtype))

    def is_finite(self) -> bool:
        """Tell whether all its numbers are."""
        return all(bool(matrix.isfinite().all()) for matrix in (self.down, self.up))

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [tokens, inputs] to what is added to the layer's output, [tokens, outputs]."""
        return x @ self.down.T @ self.up.T


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kronecker:
    """A change of weights, the Kronecker product of two matrices; the adapter's own scale is in `left`."""

    left: Tensor  # [a, b]
    right: Tensor  # [outputs / a, inputs / b]

    @property
    def size_bytes(self) -> int:
        """The memory it takes."""
        return self.left.nbytes + self.right.nbytes

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Return the same change on a device, in a dtype."""
        return type(self)(left=self.left.to(device, dtype), right=self.right.to(device, dtype))

    def is_finite(self) -> bool:
        """Tell whether all its numbers are."""
        return all(bool(matrix.isfinite().all()) for matrix in (self.left, self.right))

    def __call__(self, x: Tensor) -> Tensor:
        """Map x [tokens, inputs] to what is added to the layer's output, [tokens, outputs]."""
        blocks = x.unflatten(-1, (self.left.shape[1], self.right.shape[1]))
        return (self.left @ (blocks @ self.right.T)).flatten(-2)


Delta = LowRank | Kronecker


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adaptation:
    """An adapter at work in a song: its changes by the name of the layer in the transformer, and its strength."""

    deltas: Mapping[str, Delta]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Addition:
    """A change at a strength, for some rows of what a layer is given."""

    rows: slice
    delta: Delta
    scale: float


Additions = Mapping[nn.Module, Sequence[Addition]]

NOTHING: Additions = {}


def find_additions(module: nn.Module, spans: Sequence[tuple[slice, Sequence[Adaptation]]]) -> Additions:
    """Tell by layer of `module` what the adaptations of each span of rows add."""
    additions: dict[nn.Module, list[Addition]] = {}
    for rows, adaptations in spans:
        for adaptation in adaptations:
            for name, delta in adaptation.deltas.items():
                addition = Addition(rows=rows, delta=delta, scale=adaptation.scale)
                additions.setdefault(module.get_submodule(name), []).append(addition)
    return additions


def project(layer: nn.Module, x: Tensor, additions: Additions) -> Tensor:
    """Apply a linear layer to x [tokens, inputs], and add what adapters add to the rows they are for."""
    y: Tensor = layer(x)
    for addition in additions.get(layer, ()):
        y[addition.rows].add_(addition.delta(x[addition.rows]), alpha=addition.scale)
    return y
