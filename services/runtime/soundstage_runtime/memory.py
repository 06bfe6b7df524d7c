"""Amounts of memory, as people write them."""

import re
from dataclasses import dataclass
from typing import Final

_UNITS: Final = {"GiB": 1 << 30, "MiB": 1 << 20, "GB": 10**9, "MB": 10**6}
_AMOUNT: Final = re.compile(r"(\d+(?:\.\d+)?) ?(GiB|MiB|GB|MB)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Memory:
    """A size in bytes, or a fraction of whatever there is."""

    size_bytes: int | None = None
    fraction: float | None = None

    def of(self, total_bytes: int) -> int:
        """Return the bytes that it means of a total; never more than there are."""
        if self.fraction is not None:
            return int(self.fraction * total_bytes)
        return min(self.size_bytes or 0, total_bytes)


def parse_vram(text: str) -> float | None:
    """Read the GB that a card is made smaller to; None for an empty text. Raises ValueError saying what would do."""
    if not text.strip():
        return None
    try:
        memory_gib = float(text)
    except ValueError:
        memory_gib = 0.0
    if not 0 < memory_gib < 1000:
        raise ValueError("must be a number of GB, as 8")
    return memory_gib


def parse_memory(text: str) -> Memory:
    """Read "6GiB", "512 MiB", "6GB" or a fraction such as "0.5"; raises ValueError saying what would do."""
    found = _AMOUNT.fullmatch(text.strip())
    number = float(found[1]) if found else 0.0
    if found and found[2]:
        unit = next(unit for name, unit in _UNITS.items() if name.lower() == found[2].lower())
        if number * unit >= 1:
            return Memory(size_bytes=int(number * unit))
    elif 0 < number <= 1:
        return Memory(fraction=number)
    raise ValueError(
        f"{text!r} is no amount of memory: must be a size above 0 such as 6GiB, or a fraction above 0 and at most 1"
    )
