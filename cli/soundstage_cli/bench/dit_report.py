"""What was measured of diffusion steps: a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.table import Table

from soundstage_cli.bench.dit import (
    BASELINE,
    BASELINE_COMPILED,
    OURS,
    OURS_COMPILED,
    SLIDING,
    SLIDING_CASES,
    Plan,
    Run,
)
from soundstage_cli.bench.report import Ratio, Report, Spread, name_machine, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Whom an engine is compared with, in the same round.
_PEERS: Final = {
    OURS: (BASELINE,),
    BASELINE_COMPILED: (BASELINE,),
    OURS_COMPILED: (BASELINE, BASELINE_COMPILED),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How long an engine takes for a step of a case, and for each second of its songs; times is by peer."""

    engine: str
    duration_s: int
    songs: int
    step_s: Spread
    step_s_per_song_s: Spread
    times: Mapping[str, Spread]


def make_report(plan: Plan, runs: Sequence[Run]) -> Report:
    """Sum up the rounds and lay them out."""
    summaries = summarize(runs)
    ratios = [
        Ratio(case=f"{one.engine}, {one.songs} x {one.duration_s} s", peer=peer, times=times)
        for one in summaries
        for peer, times in one.times.items()
    ]
    growth = compare_lengths(runs)
    return Report(
        name=f"dit-{plan.size}-{plan.device}-{plan.dtype}",
        facts={"machine": name_machine(plan.device, plan.threads), "size": plan.size, "dtype": plan.dtype},
        ratios=[*ratios, growth] if growth else ratios,
        summaries=summaries,
        runs=runs,
        table=make_table(summaries),
        draw=lambda figure: _draw(figure, summaries),
    )


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Sum up the rounds."""
    steps_s = {(run.engine, run.duration_s, run.songs, run.round): run.step_s for run in runs}
    summaries: list[Summary] = []
    for engine, duration_s, songs in dict.fromkeys((run.engine, run.duration_s, run.songs) for run in runs):
        own = [run for run in runs if (run.engine, run.duration_s, run.songs) == (engine, duration_s, songs)]
        times: dict[str, Spread] = {}
        for peer in _PEERS.get(engine, ()):
            others = [(steps_s.get((peer, duration_s, songs, run.round)), run) for run in own]
            if found := [peer_s / run.step_s for peer_s, run in others if peer_s is not None]:
                times[peer] = spread(found)
        summaries.append(
            Summary(
                engine=engine,
                duration_s=duration_s,
                songs=songs,
                step_s=spread([run.step_s for run in own]),
                step_s_per_song_s=spread([run.step_s / (duration_s * songs) for run in own]),
                times=times,
            )
        )
    return summaries


def compare_lengths(runs: Sequence[Run]) -> Ratio | None:
    """Compare what a second of a long song costs the sliding layers with that of a short one: 1 where it is linear."""
    short, long = SLIDING_CASES
    costs = {(run.duration_s, run.round): run.step_s / run.duration_s for run in runs if run.engine == SLIDING}
    rounds = [number for duration_s, number in costs if duration_s == long.duration_s]
    found = [costs[short.duration_s, number] / costs[long.duration_s, number] for number in rounds]
    if not found:
        return None
    case = f"{SLIDING}, a second of {long.duration_s} s"
    return Ratio(case=case, peer=f"a second of {short.duration_s} s", times=spread(found))


def make_table(summaries: Sequence[Summary]) -> Table:
    """Lay the figures out for people."""
    peers = list(dict.fromkeys(peer for one in summaries for peer in one.times))
    table = Table(title="a diffusion step: median (least–most)")
    for heading in ("engine", "songs", "length, s", "step, s", "ms a second of song"):
        table.add_column(heading, justify="left" if heading == "engine" else "right", overflow="fold")
    for peer in peers:
        table.add_column(f"times as fast as {peer}", justify="right", overflow="fold")
    for one in summaries:
        cost_ms = f"{1000 * one.step_s_per_song_s.median:.3g}"
        times = [str(one.times.get(peer, "")) for peer in peers]
        table.add_row(one.engine, str(one.songs), str(one.duration_s), str(one.step_s), cost_ms, *times)
    return table


def _draw(figure: "Figure", summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    for engine in dict.fromkeys(one.engine for one in summaries):
        own = [one for one in summaries if one.engine == engine and one.songs == 1]
        axes.plot([one.duration_s for one in own], [one.step_s.median for one in own], marker="o", label=engine)
    axes.set(xlabel="length of a song, s", ylabel="seconds a step, one song", xlim=(0, None), ylim=(0, None))
    axes.legend()
