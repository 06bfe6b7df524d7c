"""Where and in what arithmetic a model runs."""

from collections.abc import Sequence
from typing import Literal

import structlog
import torch

from soundstage_budget import engine_choice
from soundstage_budget.cards import GIB, Card
from soundstage_budget.engine_choice import has_kernels
from soundstage_runtime.errors import StartError

_log = structlog.stdlib.get_logger()

DtypeName = Literal["auto", "float32", "float16", "bfloat16"]


class DeviceError(StartError):
    """The device that was asked for is not there, or this torch cannot use it."""


def choose_device(name: str, *, needs_kernels: bool = True) -> torch.device:
    """Return the device `name` stands for; `auto` is the first card that this torch has kernels for, or the CPU.

    Without `needs_kernels` a card for which there are none is returned too, to whoever has a rule of its own for it.
    Raises DeviceError.
    """
    count = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    cards = [describe_card(torch.device("cuda", index)) for index in range(count)]
    return choose_among(cards, name, torch_arch_list=torch.cuda.get_arch_list(), needs_kernels=needs_kernels)


def choose_among(
    cards: Sequence[Card], name: str, *, torch_arch_list: Sequence[str], needs_kernels: bool = True
) -> torch.device:
    """Choose as choose_device does, where `cards` are found and torch is built for `torch_arch_list`."""
    if name == "cpu" or (name == "auto" and not cards):
        return torch.device("cpu")
    usable = [index for index, card in enumerate(cards) if has_kernels(card, torch_arch_list)]
    index = next(iter(usable), 0) if name == "auto" else torch.device(name).index or 0
    if index >= len(cards):
        raise DeviceError(
            f"device is {name!r}, but torch {torch.__version__} sees {len(cards)} CUDA devices here; "
            "auto takes what there is"
        )
    if index in usable or not needs_kernels:
        return torch.device("cuda", index)
    card = cards[index]
    obstacle = (
        f"torch {torch.__version__} has no kernels for {card.name}, of compute capability "
        f"{'.'.join(map(str, card.capability or ()))}, only for {', '.join(torch_arch_list)}; "
        "a build of torch that has them would do"
    )
    if name != "auto":
        raise DeviceError(f"device is {name!r}, but {obstacle}, and so would cpu")
    _log.warning("card_not_used", device="cpu", why=obstacle)
    return torch.device("cpu")


def describe_card(device: torch.device, max_vram_gib: float | None = None) -> Card:
    """Return what there is to know of a device, as if a card had no more than so much memory."""
    if device.type != "cuda":
        return Card()
    found = torch.cuda.get_device_properties(device)
    memory_gib = found.total_memory / GIB
    return Card(
        name=found.name,
        memory_gib=memory_gib if max_vram_gib is None else min(memory_gib, max_vram_gib),
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
