"""What was measured, as a table, a file and a picture."""

import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table

from soundstage_cli.bench.lm import BASELINE, Plan, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
class Summary:
    """What an engine does with so many songs at once; the ratio is to the baseline's rate in the same round."""

    engine: str
    songs: int
    codes_per_s: Spread
    ratio: Spread
    first_code_s: Spread


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Sum up the rounds."""
    base = {run.round: run.codes_per_s for run in runs if run.engine == BASELINE}
    cases = dict.fromkeys((run.engine, run.songs) for run in runs)
    summaries: list[Summary] = []
    for engine, songs in cases:
        own = [run for run in runs if (run.engine, run.songs) == (engine, songs)]
        summaries.append(
            Summary(
                engine=engine,
                songs=songs,
                codes_per_s=spread([run.codes_per_s for run in own]),
                ratio=spread([run.codes_per_s / base[run.round] for run in own]),
                first_code_s=spread([run.first_code_s for run in own]),
            )
        )
    return summaries


def make_table(summaries: Sequence[Summary]) -> Table:
    """Lay the figures out for people."""
    table = Table(title="guided codes: median (least–most)")
    for heading in ("engine", "songs at once", "codes/s", f"times {BASELINE}", "first code, s"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for one in summaries:
        table.add_row(one.engine, str(one.songs), str(one.codes_per_s), str(one.ratio), str(one.first_code_s))
    return table


def write_report(folder: Path, plan: Plan, runs: Sequence[Run]) -> list[Path]:
    """Write lm.json, and lm.png where matplotlib is installed; returns the files."""
    summaries = summarize(runs)
    report = {
        "machine": name_machine("cpu", plan.threads),
        "size": plan.size,
        "dtype": plan.dtype,
        "codes": plan.num_codes,
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }
    return write_figures(folder, "lm", report, lambda figure: _draw(figure, summaries))


def write_figures(folder: Path, name: str, report: Mapping[str, Any], draw: Callable[["Figure"], None]) -> list[Path]:
    """Write a report as JSON, with when and how it came about, and a picture where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["soundstage", *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{library: importlib.metadata.version(library) for library in _LIBRARIES},
        },
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(made | dict(report), indent=2) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is None:
        return [path]
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(7, 4), layout="constrained")
    draw(figure)
    picture = folder / f"{name}.png"
    figure.savefig(picture, dpi=150)
    return [path, picture]


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


def _draw(figure: "Figure", summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    base = next(one for one in summaries if one.engine == BASELINE)
    axes.axhline(base.codes_per_s.median, color="gray", linestyle="--", label=f"{BASELINE} (one song after another)")
    for engine in dict.fromkeys(one.engine for one in summaries if one.engine != BASELINE):
        own = [one for one in summaries if one.engine == engine]
        rates = [one.codes_per_s for one in own]
        middle = [rate.median for rate in rates]
        errors = [
            [rate.median - rate.least for rate in rates],
            [rate.most - rate.median for rate in rates],
        ]
        axes.errorbar([one.songs for one in own], middle, yerr=errors, marker="o", capsize=4, label=engine)
    axes.set(xlabel="songs at once", ylabel="guided codes per second", ylim=(0, None))
    axes.legend()


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
