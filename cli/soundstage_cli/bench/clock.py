"""How often something is done to say how long it takes."""

from collections.abc import Sequence
from typing import Final

_ENOUGH_S: Final = 0.5
_MOST: Final = 20
# Of what is freed: glibc does once it has seen large tensors, and it can be told to at most.
GLIBC_KEEPS_BYTES: Final = 64 << 20
MOST_KEPT_BYTES: Final = (1 << 31) - 1


def is_enough(taken_s: Sequence[float]) -> bool:
    """Say whether so many times will do for a middle: what takes milliseconds is done again and again."""
    return sum(taken_s) >= _ENOUGH_S or len(taken_s) >= _MOST


def synchronize(device: str) -> None:
    """Wait for what a device has been given to do."""
    if device != "cpu":
        import torch  # takes seconds, and has been imported by who measures

        torch.cuda.synchronize(device)
