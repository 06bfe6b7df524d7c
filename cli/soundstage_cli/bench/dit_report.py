"""What was measured of diffusion steps, as a table, a file and a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from soundstage_cli.bench.dit import BASELINE, Plan, Run
from soundstage_cli.bench.report import Spread, name_machine, spread, write_figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How long an engine takes for a step of a case; the ratio is the baseline's time to its own in the same round."""

    engine: str
    duration_s: int
    songs: int
    step_s: Spread
    ratio: Spread


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Sum up the rounds."""
    base = {(run.duration_s, run.songs, run.round): run.step_s for run in runs if run.engine == BASELINE}
    summaries: list[Summary] = []
    for engine, duration_s, songs in dict.fromkeys((run.engine, run.duration_s, run.songs) for run in runs):
        own = [run for run in runs if (run.engine, run.duration_s, run.songs) == (engine, duration_s, songs)]
        summaries.append(
            Summary(
                engine=engine,
                duration_s=duration_s,
                songs=songs,
                step_s=spread([run.step_s for run in own]),
                ratio=spread([base[duration_s, songs, run.round] / run.step_s for run in own]),
            )
        )
    return summaries


def make_table(summaries: Sequence[Summary]) -> Table:
    """Lay the figures out for people."""
    table = Table(title="a diffusion step: median (least–most)")
    for heading in ("engine", "songs", "length, s", "step, s", f"times as fast as {BASELINE}"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for one in summaries:
        table.add_row(one.engine, str(one.songs), str(one.duration_s), str(one.step_s), str(one.ratio))
    return table


def write_report(folder: Path, plan: Plan, runs: Sequence[Run]) -> list[Path]:
    """Write dit-SIZE.json and dit-SIZE.png; returns the files."""
    summaries = summarize(runs)
    report = {
        "machine": name_machine(plan.device, plan.threads),
        "size": plan.size,
        "dtype": plan.dtype,
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }
    return write_figures(folder, f"dit-{plan.size}", report, lambda figure: _draw(figure, summaries))


def _draw(figure: "Figure", summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    for engine in dict.fromkeys(one.engine for one in summaries):
        own = [one for one in summaries if one.engine == engine and one.songs == 1]
        axes.plot([one.duration_s for one in own], [one.step_s.median for one in own], marker="o", label=engine)
    axes.set(xlabel="length of a song, s", ylabel="seconds a step, one song", xlim=(0, None), ylim=(0, None))
    axes.legend()
