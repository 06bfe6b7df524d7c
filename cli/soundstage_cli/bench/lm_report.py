"""What was measured of planning: a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from soundstage_cli.bench.lm import BASELINE, Plan, Run
from soundstage_cli.bench.report import Ratio, Report, Spread, name_machine, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What an engine does with so many songs at once; the ratio is to the baseline's rate in the same round."""

    engine: str
    songs: int
    codes_per_s: Spread
    ratio: Spread
    first_code_s: Spread


def make_report(plan: Plan, runs: Sequence[Run]) -> Report:
    """Sum up the rounds and lay them out."""
    summaries = summarize(runs)
    return Report(
        name=f"lm-{plan.size}-{plan.device}-{plan.dtype}",
        facts={
            "machine": name_machine(plan.device, plan.threads),
            "size": plan.size,
            "dtype": plan.dtype,
            "codes": plan.num_codes,
        },
        ratios=[
            Ratio(case=f"{one.engine}, {one.songs} at once", peer=BASELINE, times=one.ratio)
            for one in summaries
            if one.engine != BASELINE
        ],
        summaries=summaries,
        runs=runs,
        table=make_table(summaries),
        draw=lambda figure: _draw(figure, summaries),
    )


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
        table.add_column(heading, justify="left" if heading == "engine" else "right", overflow="fold")
    for one in summaries:
        table.add_row(one.engine, str(one.songs), str(one.codes_per_s), str(one.ratio), str(one.first_code_s))
    return table


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
