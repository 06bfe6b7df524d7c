"""A process's share of a card: read of what the card is, or is made to be, and kept to by torch."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from soundstage_budget.need import context_bytes
from soundstage_budget.plan import DoesNotFitError
from soundstage_device.budget import memory_bytes, pin_budget, read_budget
from soundstage_device.device import describe_card

GIB = 1 << 30
CARD, CPU = torch.device("cuda"), torch.device("cpu")


@dataclass
class Properties:
    """What torch would report of a card."""

    name: str = "H100"
    total_memory: int = 80 * GIB
    major: int = 9
    minor: int = 0


class Machine:
    """A machine with that card; `fractions` are those that torch's allocator was told to keep to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fractions: list[float] = []
        self.num_looks = 0
        self.free_bytes = 79 * GIB
        monkeypatch.setattr(torch.cuda, "get_device_properties", {CARD: Properties()}.__getitem__)
        monkeypatch.setattr(torch.cuda, "mem_get_info", self._look)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._keep)

    def _look(self, _: torch.device) -> tuple[int, int]:
        self.num_looks += 1
        return self.free_bytes, Properties().total_memory

    def _keep(self, fraction: float, _: torch.device) -> None:
        self.fractions.append(fraction)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(
    ("gpu_memory", "max_vram_gib", "budget_gib"),
    [
        ("", None, None),
        ("6GiB", None, 6),
        ("0.5", None, 40),
        ("0.5", 8, 4),
        ("12GiB", 8, 8),
        ("", 8, 8),  # a card that is made smaller is kept to in any case
        ("0.5", 200, 40),
    ],
)
def test_a_budget_is_of_the_card_or_of_the_smaller_one(
    machine: Machine, gpu_memory: str, max_vram_gib: float | None, budget_gib: float | None
) -> None:
    expected = None if budget_gib is None else budget_gib * GIB
    assert read_budget(gpu_memory, CARD, max_vram_gib) == expected
    assert machine.num_looks == 0  # a look at what is free would put a context on the card


def test_the_smaller_card_is_what_is_seen(machine: Machine) -> None:
    assert describe_card(CARD, 8).memory_gib == 8
    assert (memory_bytes(CARD, 8), memory_bytes(CARD)) == (8 * GIB, 80 * GIB)
    assert read_budget("", CPU, 8) is None
    assert describe_card(CPU, 8).capability is None


def test_torch_keeps_to_a_budget_less_the_context(machine: Machine) -> None:
    pin_budget(8 * GIB, CARD)
    assert machine.fractions == [pytest.approx((8 * GIB - context_bytes(on_card=True)) / (80 * GIB))]
    pin_budget(None, CARD)
    pin_budget(8 * GIB, CPU)
    assert len(machine.fractions) == 1


def test_a_budget_that_others_have_taken_is_refused(machine: Machine) -> None:
    machine.free_bytes = 3 * GIB
    with pytest.raises(DoesNotFitError, match=r"gpu_memory is 8\.00 GiB, but other processes have left 3\.44 GiB"):
        pin_budget(8 * GIB, CARD)
    assert machine.fractions == []


HOLES = """
import sys, torch
from soundstage_device.budget import pin_budget
pin_budget(1 << 30 if "pinned" in sys.argv else None, torch.device("cpu"))
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.ones(7 << 20)  # from now on glibc would have tensors of up to this size on its heap
before, kept = resident(), []
for _ in range(20):
    large = torch.ones(3 << 20)
    kept.append(torch.ones(1 << 10))  # above what goes
    del large
    kept.append(torch.ones((3 << 20) + 4096 * len(kept)) if len(kept) % 4 == 0 else None)
del kept[1::2]
print(resident() - before)
"""


def taken_by_holes(*arguments: str) -> int:
    """How many bytes are resident after large tensors have gone, with small ones among them."""
    done = subprocess.run([sys.executable, "-c", HOLES, *arguments], check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_on_a_cpu_what_has_gone_leaves_no_holes() -> None:
    assert taken_by_holes("pinned") < 4 << 20
    assert taken_by_holes() > 4 << 20


FAULTS = """
import resource, sys, threading, torch
from soundstage_device.budget import pin_budget
pin_budget(1 << 30 if "pinned" in sys.argv else None, torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    counts = []
    for _ in range(3):
        before = faults()
        for mib in (3, 1, 9, 33):
            sum((torch.ones(mib << 18) for _ in range(3)), torch.zeros(mib << 18))
        counts.append(faults() - before)
    print(counts[-1])
worker = threading.Thread(target=work)
worker.start()
worker.join()
"""


def pages_asked_for(*arguments: str) -> int:
    """How many pages a thread asks the kernel for, which works through the same tensors for the third time."""
    done = subprocess.run([sys.executable, "-c", FAULTS, *arguments], check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_on_a_cpu_without_a_budget_memory_is_used_again() -> None:
    assert pages_asked_for() < 100
    assert pages_asked_for("pinned") > 10_000
