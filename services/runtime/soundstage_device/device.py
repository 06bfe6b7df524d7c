"""Where and in what arithmetic a model runs."""

from typing import Literal

import torch

from soundstage_budget import engine_choice
from soundstage_budget.cards import GIB, Card
from soundstage_runtime.errors import StartError

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


class DeviceError(StartError):
    """The device that was asked for is not there."""


def choose_device(name: str) -> torch.device:
    """Return the device `name` stands for; `auto` is the first CUDA device, or the CPU. Raises DeviceError."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device is {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            "auto takes what there is"
        )
    return device


def describe_card(device: torch.device) -> Card:
    """Return what there is to know of a device."""
    if device.type != "cuda":
        return Card()
    found = torch.cuda.get_device_properties(device)
    return Card(
        name=found.name,
        memory_gib=found.total_memory / GIB,
        capability=(found.major, found.minor),
        is_rocm=torch.version.hip is not None,
    )


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype `name` stands for; `auto` is what the card is good at."""
    chosen = engine_choice.choose_dtype(describe_card(device)) if name == "auto" else name
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[chosen]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the plain name of a dtype: "float32"."""
    return str(dtype).removeprefix("torch.")
