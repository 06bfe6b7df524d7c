"""What stages take of their device's memory at most, while they make songs."""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_budget.cards import Card
from soundstage_budget.plan import Plan
from soundstage_budget.single_card import Checkpoints, flags_of, share
from soundstage_cli.channel import open_channel
from soundstage_cli.models import Models
from soundstage_cli.stack import STAGES, Stack

_SMI: Final = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits")
_MIB: Final = 1 << 20


def plan_within(card: Card, memory_gib: float, sizes: Checkpoints, *, songs: int, duration_s: int) -> tuple[Plan, ...]:
    """Plan just so many songs of a length on a card of which only so much is used; raises BudgetsDoNotAddUpError."""
    capped = replace(card, memory_gib=min(memory_gib, card.memory_gib))
    return share(capped, sizes, max_batch=songs, max_duration_s=duration_s)


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
        if card.capability is None:
            return {name: _resident_peak(pid) - baselines[name] for name, pid in pids.items()}
        used = _used_on_card()
        return {name: used.get(pid) for name, pid in pids.items()}
    finally:
        await stack.stop()


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
