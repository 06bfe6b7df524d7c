"""Matrix products with fixed weights, and the layout that is fastest for them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage_device.products import multiply, pack


class Projection(nn.Module):
    """x [rows, inputs] to [rows, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Lay the weight out for this CPU, where it is on one and oneDNN can; it cannot be read back."""
        if self.weight.device.type == "cpu" and self._packed is None:
            self._packed = pack(self.weight.data)
            if self._packed is not None:
                self.weight = nn.Parameter(self.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self._packed is None else multiply(x, self._packed)
