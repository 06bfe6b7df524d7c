"""What stages take of their device's memory at most, while they make songs."""

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_budget.cards import Card
from soundstage_budget.installed import find_installed
from soundstage_budget.plan import Plan
from soundstage_budget.single_card import Checkpoints, Terms, flags_of, share
from soundstage_cli.channel import open_channel
from soundstage_cli.models import Models
from soundstage_cli.stack import STAGES, Stack

_SMI: Final = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
_MIB: Final = 1 << 20


def plan_within(card: Card, memory_gib: float, sizes: Checkpoints, *, songs: int, duration_s: int) -> tuple[Plan, ...]:
    """Plan just so many songs of a length on a card of which only so much is used; raises BudgetsDoNotAddUpError."""
    capped = replace(card, memory_gib=min(memory_gib, card.memory_gib))
    return share(capped, sizes, Terms(max_batch=songs, max_duration_s=duration_s, installed=find_installed()))


async def measure(
    card: Card, plans: tuple[Plan, ...], models: Models, *, baselines: Mapping[str, int]
) -> dict[str, int | None]:
    """Run stages as planned, make as many songs as long as that, and return the bytes each has taken at most.

    None stands for what the driver does not tell. Raises ProcessDiedError and grpc.aio.AioRpcError.
    """
    stack = Stack(models, flags=flags_of(plans))
    try:
        await stack.start()
        request = GenerateSongRequest(caption="a bright tune", lyrics="la la la", variants=plans[0].max_batch)
        request.metadata.duration_s = plans[0].max_duration_s
        async with open_channel(stack.target) as channel:
            async for _ in SongServiceStub(channel).GenerateSong(request):
                pass
        pids = {name: process.pid for name in STAGES if (process := stack.members[name].process) is not None}
        families = {name: find_family(pid) for name, pid in pids.items()}
        if card.capability is None:
            return {name: sum(map(_resident_peak, family)) - baselines[name] for name, family in families.items()}
        return {name: sum_used(family, _used_on_card()) for name, family in families.items()}
    finally:
        await stack.stop()


def find_family(pid: int) -> list[int]:
    """Return a process and all that descend from it, as the kernel has them just now."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            # Its name, in parentheses, may hold anything.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    family = [pid]
    for member in family:  # which grows
        family += [child for child, parent in parents.items() if parent == member]
    return family


def sum_used(family: Sequence[int], used: Mapping[int, int]) -> int | None:
    """Return what processes have of a card together; None where none of them is told of."""
    told = [used[pid] for pid in family if pid in used]
    return sum(told) if told else None


def read_baselines() -> dict[str, int]:
    """Return what each stage's modules take of the host before they do anything."""
    return {name: _import_peak(name) for name in STAGES}


def _import_peak(stage: str) -> int:
    script = f"import soundstage_{stage}.__main__; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return _read_peak(done.stdout)


def _resident_peak(pid: int) -> int:
    return _read_peak(Path(f"/proc/{pid}/status").read_text())


def _read_peak(status: str) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def _used_on_card() -> dict[int, int]:
    """Ask the driver what each process has of the card: torch gives nothing back, so that is its peak."""
    try:
        told = subprocess.run(_SMI, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.split(",") for line in told.splitlines())
    return {int(pid): int(mib) * _MIB for pid, mib in pairs if mib.strip().isdigit()}
