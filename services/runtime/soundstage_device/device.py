"""Where and in what arithmetic a model runs."""

from typing import Literal

import torch

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


def choose_device(name: str) -> torch.device:
    """Return the device `name` stands for; `auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype `name` stands for; `auto` is float32 on a CPU, bfloat16 from capability 8.0, else float16."""
    if name != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def dtype_name(dtype: torch.dtype) -> str:
    """Return the plain name of a dtype: "float32"."""
    return str(dtype).removeprefix("torch.")
