"""Matrix products with fixed weights, and the layout that is fastest for them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def pack(weight: Tensor) -> Tensor | None:
    """Return a weight in oneDNN's own layout, several times as fast for few rows; None where that is not to be had."""
    operators: Any = torch.ops.mkldnn
    try:
        packed = operators._reorder_linear_weight(weight.contiguous(), 2)
        sample = weight[:1].contiguous()
        found, wanted = multiply(sample, packed).float(), F.linear(sample, weight).float()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None  # they are not public operators: another torch, or another CPU, may not have them
    # Two orders of adding, rounded to the type.
    return packed if torch.allclose(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max())) else None


def multiply(x: Tensor, packed: Tensor) -> Tensor:
    """Multiply x [rows, inputs] by a packed weight."""
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise(x, packed, None, "none", [], "")
