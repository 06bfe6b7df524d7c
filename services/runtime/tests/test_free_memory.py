"""What a process may still use of a card, by what the driver and torch's allocator say."""

import math

import pytest
import torch

from soundstage_budget.need import context_bytes
from soundstage_device.budget import free_bytes

GIB = 1 << 30
CARD = torch.device("cuda")


def on_card(monkeypatch: pytest.MonkeyPatch, *, free: int, reserved: int, allocated: int) -> None:
    """Have torch report this of a card; it holds `reserved`, and uses `allocated` of that."""
    answers = {"mem_get_info": (free, 24 * GIB), "memory_reserved": reserved, "memory_allocated": allocated}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, {CARD: answer}.__getitem__)


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "budget", "expected"),
    [
        (10, 0, 0, None, 10),
        (10, 5, 3, None, 12),  # and what the allocator holds for nothing
        (10, 5, 3, 8, 5),  # no more than the budget
        (1, 5, 3, 8, 3),  # no more than others have left
        (10, 5, 3, 4, 1),  # where the budget is gone only what is held already
    ],
)
def test_free_is_what_nobody_holds_and_what_is_held_for_nothing(
    monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, allocated: int, budget: int | None, expected: int
) -> None:
    on_card(monkeypatch, free=free * GIB, reserved=reserved * GIB, allocated=allocated * GIB)
    budget_bytes = None if budget is None else budget * GIB + context_bytes(on_card=True)
    assert free_bytes(CARD, budget_bytes) == expected * GIB


def test_a_cpu_is_not_read() -> None:
    assert free_bytes(torch.device("cpu"), GIB) == math.inf
