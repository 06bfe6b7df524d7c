"""Cards: what torch would report of them."""

from dataclasses import dataclass
from typing import Final

GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A device as torch sees it; a CPU has no capability, and a ROCm card's number means nothing here."""

    name: str = "CPU"
    memory_gib: float = 0.0
    capability: tuple[int, int] | None = None
    is_rocm: bool = False

    @property
    def memory_bytes(self) -> int:
        """The memory in bytes."""
        return int(self.memory_gib * GIB)


class UnknownCardError(ValueError):
    """No card goes by that name; the message lists those that are known."""


def _cuda(name: str, memory_gib: float, major: int, minor: int) -> Card:
    return Card(name=name, memory_gib=memory_gib, capability=(major, minor))


# Memory as reported: a little less than what is printed on the box.
CARDS: Final = (
    _cuda("GTX 980 Ti 6GB", 5.9, 5, 2),
    _cuda("GTX 1060 3GB", 2.9, 6, 1),
    _cuda("GTX 1060 6GB", 5.9, 6, 1),
    _cuda("GTX 1080 8GB", 7.9, 6, 1),
    _cuda("GTX 1080 Ti 11GB", 10.9, 6, 1),
    _cuda("TITAN Xp 12GB", 11.9, 6, 1),
    _cuda("Tesla P100 16GB", 15.9, 6, 0),
    _cuda("Tesla V100 16GB", 15.8, 7, 0),
    _cuda("Tesla V100 32GB", 31.7, 7, 0),
    _cuda("GTX 1650 4GB", 3.8, 7, 5),
    _cuda("RTX 2060 6GB", 5.8, 7, 5),
    _cuda("RTX 2080 Ti 11GB", 10.7, 7, 5),
    _cuda("Tesla T4 16GB", 14.6, 7, 5),
    _cuda("RTX 3050 8GB", 7.7, 8, 6),
    _cuda("RTX 3060 12GB", 11.6, 8, 6),
    _cuda("RTX 3080 10GB", 9.7, 8, 6),
    _cuda("RTX A4000 16GB", 15.7, 8, 6),
    _cuda("RTX A4500 20GB", 19.7, 8, 6),
    _cuda("A10 24GB", 22.1, 8, 6),
    _cuda("RTX 3090 24GB", 23.6, 8, 6),
    _cuda("A100 40GB", 39.4, 8, 0),
    _cuda("A100 80GB", 79.2, 8, 0),
    _cuda("RTX 4060 8GB", 7.6, 8, 9),
    _cuda("RTX 4060 Ti 16GB", 15.6, 8, 9),
    _cuda("RTX 4070 12GB", 11.6, 8, 9),
    _cuda("RTX 4090 24GB", 23.5, 8, 9),
    _cuda("L4 24GB", 22.0, 8, 9),
    _cuda("L40S 48GB", 44.4, 8, 9),
    _cuda("H100 80GB", 79.1, 9, 0),
    _cuda("H200 141GB", 139.8, 9, 0),
    _cuda("B200 180GB", 178.4, 10, 0),
    _cuda("RTX 5070 12GB", 11.5, 12, 0),
    _cuda("RTX 5090 32GB", 31.4, 12, 0),
    Card(name="MI300X 192GB", memory_gib=191.5, capability=(9, 4), is_rocm=True),
)


def find_card(name: str) -> Card:
    """Return the one card whose name holds all words of `name`, in any case; raises UnknownCardError."""
    wanted = name.lower().replace(" gb", "gb").split()
    found = [card for card in CARDS if wanted and set(wanted) <= set(card.name.lower().split())]
    if len(found) == 1:
        return found[0]
    choice = ", ".join(card.name for card in found or CARDS)
    raise UnknownCardError(f"is {name!r}, which names {len(found) or 'no'} cards; must be one of {choice}")
