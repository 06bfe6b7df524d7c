"""What listeners heard: a report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from soundstage_cli.bench.playback import Audience
from soundstage_cli.bench.report import Ratio, Report, Spread, name_machine, spread
from soundstage_cli.bench.stream import ORDERS, Comparison, Plan, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """How many times as much first-come is of earliest-dry, in the same round."""

    waited: Spread
    worst_wait: Spread


def compare(comparison: Comparison) -> Ratios:
    """Compare the orders round by round."""
    rounds = dict.fromkeys(run.round for run in comparison.runs)
    heard = {(run.order, run.round): run.audience for run in comparison.runs}
    pairs = [tuple(heard[order, number] for order in ORDERS) for number in rounds]
    return Ratios(
        waited=spread([first.waited_s / dry.waited_s for first, dry in pairs]),
        worst_wait=spread([first.worst_wait_s / dry.worst_wait_s for first, dry in pairs]),
    )


def make_table(gateway: Audience, comparison: Comparison) -> Table:
    """Lay the figures out for people."""
    table = Table(title="listeners: what they waited for sound, s")
    headings = ("served by", "round", "listeners", "first p50", "p95", "p99", "underruns", "s", "worst wait", "in all")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "served by" else "right", overflow="fold")
    rows = [("gateway", "", gateway)]
    rows += [(f"codec, {run.order}", str(run.round), run.audience) for run in comparison.runs]
    for name, number, heard in rows:
        figures = (
            heard.first_audio_p50_s,
            heard.first_audio_p95_s,
            heard.first_audio_p99_s,
            heard.underruns,
            heard.underrun_s,
            heard.worst_wait_s,
            heard.waited_s,
        )
        table.add_row(name, number, str(heard.listeners), *(f"{figure:.3g}" for figure in figures))
    ratios = compare(comparison)
    table.caption = (
        f"first-come has listeners wait {ratios.waited} times as long as earliest-dry in all, "
        f"{ratios.worst_wait} times at worst"
    )
    return table


def make_report(plan: Plan, gateway: Audience, comparison: Comparison, runs: Sequence[Run]) -> Report:
    """Lay out what was heard in these rounds."""
    comparison = replace(comparison, runs=runs)
    compared = compare(comparison)
    first_come, earliest_dry = ORDERS
    return Report(
        name=f"stream-{plan.listeners}x{plan.song_s:g}s-load-{plan.load:g}",
        facts={
            "machine": name_machine("cpu", plan.threads),
            "plan": asdict(plan) | {"models": str(plan.models)},
            "codec": {"speed": comparison.speed, "window_s": comparison.window_s},
        },
        ratios=[
            Ratio(case=f"{earliest_dry}, {what}", peer=first_come, times=times)
            for what, times in (("all waits", compared.waited), ("the worst wait", compared.worst_wait))
        ],
        summaries=[gateway],
        runs=comparison.runs,
        table=make_table(gateway, comparison),
        draw=lambda figure: _draw(figure, comparison),
    )


def _draw(figure: "Figure", comparison: Comparison) -> None:
    axes = figure.subplots()
    for order, colour in zip(ORDERS, ("tab:red", "tab:green"), strict=True):
        runs: Sequence[Sequence[float]] = [run.waited_s for run in comparison.runs if run.order == order]
        share = np.linspace(0, 1, len(runs[0]))
        axes.plot(share, np.median(runs, axis=0), color=colour, label=order)
        axes.fill_between(share, np.min(runs, axis=0), np.max(runs, axis=0), color=colour, alpha=0.2)
    axes.set(xlabel="share of listeners", ylabel="seconds each waited for sound", xlim=(0, 1), ylim=(0, None))
    axes.legend()
