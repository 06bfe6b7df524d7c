"""Matrix products by oneDNN's own kernels, which are faster than torch's choice for float32, or for few rows."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

_FEW_ROWS = 2  # what a weight is laid out for; more rows are no slower for it


@cache
def has_products() -> bool:
    """Say whether `multiply` is to be had: its operator is not public, so another torch or CPU may lack it."""
    rows, weight = torch.eye(3, 4), torch.arange(20.0).view(5, 4)
    try:
        return torch.allclose(multiply(rows, weight), rows @ weight.T)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def pack(weight: Tensor) -> Tensor | None:
    """Return a weight in oneDNN's own layout, several times as fast for few rows; None where that is not to be had."""
    operators: Any = torch.ops.mkldnn
    try:
        packed = operators._reorder_linear_weight(weight.contiguous(), _FEW_ROWS)
        sample = weight[:1].contiguous()
        found, wanted = multiply(sample, packed).float(), (sample @ weight.T).float()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    # Two orders of adding, rounded to the type.
    return packed if torch.allclose(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max())) else None


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [rows, inputs] by a weight [outputs, inputs], packed or contiguous."""
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise(x, weight, None, "none", [], "")
