"""A linear layer whose weight can be laid out for the CPU that it runs on."""

import torch
from torch import Tensor, nn

from soundstage_device.products import multiply, pack


class Linear(nn.Linear):
    """x [tokens, in_features] to [tokens, out_features], without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Lay a plain weight out for this CPU, where it is on one and oneDNN can; it cannot be read back."""
        weight = self.weight.data
        if type(weight) is Tensor and weight.device.type == "cpu" and self._packed is None:
            self._packed = pack(weight)
            if self._packed is not None:
                self.weight = nn.Parameter(torch.empty_like(weight[:0]), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear calls it
        return nn.functional.linear(input, self.weight) if self._packed is None else multiply(input, self._packed)


def pack_linears(module: nn.Module) -> None:
    """Pack every Linear in a module. To be called on the thread that runs it; the weights cannot be read back."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.pack()
