"""What was measured of whole songs: a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.table import Table

from soundstage_cli.bench.report import Ratio, Report, Spread, name_machine, spread
from soundstage_cli.bench.song import (
    BASELINE,
    BASELINE_COMPILED,
    BASELINE_KEPT,
    IN_TURN,
    ONE_PROCESS,
    OURS,
    OVERLAPPING,
    STEPS,
    Plan,
    Run,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Whom a way is compared with, in the same round.
_PEERS: Final = {
    BASELINE_COMPILED: (BASELINE,),
    ONE_PROCESS: (BASELINE, BASELINE_KEPT, BASELINE_COMPILED),
    OURS: (BASELINE, BASELINE_KEPT, BASELINE_COMPILED, ONE_PROCESS),
    OVERLAPPING: (IN_TURN,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How long an engine takes for a song; `times` are what others took to what it took in the same round, by peer.

    Of ours there is also the share of the time that one process takes, and how much sooner than there audio is heard.
    """

    engine: str
    duration_s: int
    song_s: Spread
    first_audio_s: Spread
    times: Mapping[str, Spread]
    share_of_one_process: Spread | None
    first_audio_sooner: Spread | None


def make_report(plan: Plan, runs: Sequence[Run]) -> Report:
    """Sum up the rounds and lay them out."""
    summaries = summarize(runs)
    lengths = "-".join(f"{duration_s}s" for duration_s in plan.durations_s)
    ratios = [
        Ratio(case=f"{one.engine}, {one.duration_s} s", peer=peer, times=times)
        for one in summaries
        for peer, times in one.times.items()
    ]
    ratios += [
        Ratio(case=f"{one.engine}, first audio of {one.duration_s} s", peer=ONE_PROCESS, times=one.first_audio_sooner)
        for one in summaries
        if one.first_audio_sooner
    ]
    return Report(
        name=f"song-{plan.size}-{plan.device}-{plan.dtype}-{lengths}",
        facts={
            "machine": name_machine(plan.device, plan.threads),
            "size": plan.size,
            "steps": STEPS,
            "dtype": plan.dtype,
            "together": plan.together,
        },
        ratios=ratios,
        summaries=summaries,
        runs=runs,
        table=make_table(summaries),
        draw=lambda figure: _draw(figure, summaries),
    )


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Sum up the rounds."""
    by_way = {(run.engine, run.duration_s, run.round): run for run in runs}
    cases = dict.fromkeys((run.engine, run.duration_s) for run in runs)
    return [_summarize([run for run in runs if (run.engine, run.duration_s) == case], by_way) for case in cases]


def _summarize(runs: Sequence[Run], by_way: Mapping[tuple[str, int, int], Run]) -> Summary:
    """Sum up an engine's songs of one length."""
    engine = runs[0].engine
    pairs = {
        peer: [(other, run) for run in runs if (other := by_way.get((peer, run.duration_s, run.round)))]
        for peer in _PEERS.get(engine, ())
    }
    with_one = pairs.get(ONE_PROCESS)
    return Summary(
        engine=engine,
        duration_s=runs[0].duration_s,
        song_s=spread([run.song_s for run in runs]),
        first_audio_s=spread([run.first_audio_s for run in runs]),
        times={peer: spread([other.song_s / run.song_s for other, run in met]) for peer, met in pairs.items() if met},
        share_of_one_process=spread([run.song_s / one.song_s for one, run in with_one]) if with_one else None,
        first_audio_sooner=spread([one.first_audio_s / run.first_audio_s for one, run in with_one])
        if with_one
        else None,
    )


def make_table(summaries: Sequence[Summary]) -> Table:
    """Lay the figures out for people."""
    peers = [peer for peer in dict.fromkeys(peer for one in summaries for peer in one.times) if peer != ONE_PROCESS]
    table = Table(title="a whole song: median (least–most)")
    headings = ["way", "song, s", "took, s", "first audio, s", *(f"times as fast as {peer}" for peer in peers)]
    for heading in (*headings, f"share of {ONE_PROCESS}"):
        table.add_column(heading, justify="left" if heading == "way" else "right", overflow="fold")
    for one in summaries:
        figures = [one.song_s, one.first_audio_s, *(one.times.get(peer, "") for peer in peers)]
        table.add_row(one.engine, str(one.duration_s), *map(str, figures), str(one.share_of_one_process or ""))
    return table


def _draw(figure: "Figure", summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    labels = [
        f"{one.engine}, {one.duration_s} s"
        + (f"\n{one.times[IN_TURN]} times as fast as in turn" if IN_TURN in one.times else "")
        for one in summaries
    ]
    axes.barh(labels, [one.song_s.median for one in summaries], color="tab:blue", label="a song")
    # Thinner: songs that overlap may be first heard later than one takes in the mean.
    first_s = [one.first_audio_s.median for one in summaries]
    axes.barh(labels, first_s, 0.4, color="tab:orange", label="until first audio")
    axes.set(xlabel="seconds")
    axes.invert_yaxis()
    axes.legend()
