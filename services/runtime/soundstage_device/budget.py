"""A process's share of its device's memory: read, and kept to."""

import ctypes
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import structlog
import torch

from soundstage_budget.need import context_bytes
from soundstage_budget.plan import DoesNotFitError, size
from soundstage_device.device import describe_card
from soundstage_runtime.memory import parse_memory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h
_LARGE_BYTES: Final = 1 << 20
STAGE_KEEPS_BYTES: Final = 1 << 28

_log = structlog.stdlib.get_logger()


def memory_bytes(device: torch.device, max_vram_gib: float | None = None) -> int:
    """Return how much memory a device has, of a card no more than so much; a CPU's is the machine's."""
    if device.type == "cuda":
        return describe_card(device, max_vram_gib).memory_bytes
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_budget(gpu_memory: str, device: torch.device, max_vram_gib: float | None = None) -> int | None:
    """Return the bytes that a setting means of a device; None for no budget.

    A card that is made smaller is a budget by itself. Nothing is put on the device, not even a context.
    """
    if gpu_memory:
        return parse_memory(gpu_memory).of(memory_bytes(device, max_vram_gib))
    return memory_bytes(device, max_vram_gib) if max_vram_gib is not None and device.type == "cuda" else None


def pin_budget(budget_bytes: int | None, device: torch.device) -> None:
    """Have torch refuse more of a card than a budget; a CPU's is kept to by admission, and by keeping nothing unused.

    To be called before anything is loaded. Raises DoesNotFitError when another process has taken what it would need.
    """
    if device.type != "cuda":
        if budget_bytes is None:
            keep_freed_memory()
        else:
            _return_freed_memory()
        return
    if budget_bytes is None:
        return
    total = memory_bytes(device)
    free = torch.cuda.mem_get_info(device)[0] + context_bytes(on_card=True)  # ours is taken by now
    if budget_bytes > free:
        raise DoesNotFitError(
            f"gpu_memory is {size(budget_bytes)}, but other processes have left {size(free)} of the card's "
            f"{size(total)}; end some, or give at most that"
        )
    torch.cuda.set_per_process_memory_fraction(max(0.0, budget_bytes - context_bytes(on_card=True)) / total, device)


def keep_freed_memory(up_to_bytes: int = STAGE_KEEPS_BYTES) -> None:
    """Have glibc keep so much of what is freed, for the next tensors: to be called before there are threads.

    Left to itself it keeps 64 MiB at most, returns other tensors' pages as they go, and asks for new ones, which the
    kernel has to clear.
    """
    # On one heap: what a thread frees of a heap of its own goes back whatever the thresholds are.
    _set_malloc({_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: up_to_bytes // 2, _M_TRIM_THRESHOLD: up_to_bytes})


def _return_freed_memory() -> None:
    """Have glibc give large tensors back to the system as they go: left to itself it keeps ever larger ones."""
    _set_malloc({_M_MMAP_THRESHOLD: _LARGE_BYTES})


def _set_malloc(options: Mapping[int, int]) -> None:
    with suppress(AttributeError):  # another libc
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def free_bytes(device: torch.device, budget_bytes: int | None) -> float:
    """Return what torch can still use of a device now, within the process's budget; a CPU's is infinite.

    That is what no process holds, and what torch's allocator holds for nothing.
    """
    if device.type != "cuda":
        return math.inf
    reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = math.inf if budget_bytes is None else budget_bytes - context_bytes(on_card=True)
    return min(torch.cuda.mem_get_info(device)[0], allowed - reserved) + reserved - used


def tell_given_up(given_up: Sequence[str]) -> None:
    """Warn, in the log, of each thing that a budget has no room for."""
    for words in given_up:
        _log.warning("budget_gave_up", what=words)
