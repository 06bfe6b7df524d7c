"""Weights from safetensors into modules, strictly."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from soundstage_runtime.checkpoint import CheckpointError, check_names, weight_files

M = TypeVar("M", bound=nn.Module)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder's safetensors file or shards, on the CPU. Raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); is it cut short? Fetch it again") from error
    return tensors


def build(
    make: Callable[[], M], tensors: Mapping[str, Tensor], *, where: str, device: torch.device, dtype: torch.dtype
) -> M:
    """Make a module without memory for its weights, then give it exactly `tensors`, ready for inference.

    Raises CheckpointError when a name is missing or unexpected, or a shape differs.
    """
    try:
        with init_empty_weights(include_buffers=False):
            module = make()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where}: the configuration makes no model ({error})") from error
    wanted = module.state_dict()
    check_names(tensors, wanted, where=where)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(tensor.shape)}; the configuration wants {list(wanted[name].shape)}"
            )
    module.load_state_dict(dict(tensors), strict=True, assign=True)
    return module.requires_grad_(False).eval().to(device=device, dtype=dtype)
