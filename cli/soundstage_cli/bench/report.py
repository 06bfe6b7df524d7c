"""What a benchmark found: its files, and a line in the history of all."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTORY: Final = "history.jsonl"
_LIBRARIES: Final = ("torch", "transformers", "diffusers", "numpy", "grpcio")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The middle of several figures, and how far they lie apart."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}–{self.most:.3g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times as fast as a peer something was, in the same rounds."""

    case: str
    peer: str
    times: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a benchmark found. `name` is that of its files; `facts` say on what machine, at what size and so on."""

    name: str
    facts: Mapping[str, Any]
    ratios: Sequence[Ratio]
    summaries: Sequence[Any]  # dataclasses, as the runs are
    runs: Sequence[Any]
    table: Table
    draw: Callable[["Figure"], None]


def write_report(folder: Path, report: Report) -> list[Path]:
    """Write a report as JSON, with when and how it came about, and a picture where matplotlib is installed."""
    made = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["soundstage", *sys.argv[1:]]),
        "commit": _find_commit(),
        "versions": {
            "python": platform.python_version(),
            **{library: importlib.metadata.version(library) for library in _LIBRARIES},
        },
    }
    found = {name: [asdict(one) for one in getattr(report, name)] for name in ("ratios", "summaries", "runs")}
    path = folder / f"{report.name}.json"
    unfinished = path.with_suffix(".part")  # whoever is ended while writing leaves what was there
    unfinished.write_text(json.dumps(made | dict(report.facts) | found, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
    if find_spec("matplotlib") is None:
        return [path]
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(7, 4), layout="constrained")
    report.draw(figure)
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    return [path, picture]


def remember(path: Path) -> Path:
    """Add what a report's file says, but for the single runs, to the history beside it; returns that."""
    told = json.loads(path.read_text(encoding="utf-8"))
    del told["runs"]
    history = path.with_name(HISTORY)
    with history.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"bench": path.stem} | told) + "\n")
    return history


def list_history(folder: Path) -> Table:
    """Lay out all ratios that a folder's history tells of; raises FileNotFoundError."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("date", "what", "case", "times as fast", "as"):
        table.add_column(heading, justify="right" if heading == "times as fast" else "left", overflow="fold")
    for line in (folder / HISTORY).read_text(encoding="utf-8").splitlines():
        told = json.loads(line)
        for ratio in told["ratios"]:
            times = Spread(**ratio["times"])
            table.add_row(told["date"][:10], told["bench"], ratio["case"], str(times), ratio["peer"])
    return table


def has_card() -> bool:
    """Say whether torch finds a card here."""
    import torch  # takes seconds, and is imported by who measures

    return torch.cuda.is_available()


def name_machine(device: str, threads: int) -> str:
    """Name what was measured on."""
    if device == "cpu":
        return f"{_name_cpu()}, {threads} threads"
    import torch  # takes seconds, and has been imported by who measured

    return torch.cuda.get_device_name(device)


def spread(figures: Sequence[float]) -> Spread:
    """Find the middle and the ends."""
    return Spread(median=median(figures), least=min(figures), most=max(figures))


def _name_cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _find_commit() -> str | None:
    """Name the commit that these sources are of, `-dirty` where they differ from it; None outside a repository."""
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
