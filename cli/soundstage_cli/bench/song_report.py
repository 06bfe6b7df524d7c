"""What was measured of whole songs, as a table, a file and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from soundstage_cli.bench.report import Spread, name_machine, spread, write_figures
from soundstage_cli.bench.song import BASELINE, IN_TURN, ONE_PROCESS, OVERLAPPING, STEPS, Plan, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How long an engine takes for a song; ratios are to what another took in the same round."""

    engine: str
    duration_s: int
    song_s: Spread
    first_audio_s: Spread
    times_baseline: Spread
    share_of_one_process: Spread
    times_in_turn: Spread | None  # of songs that overlap


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Sum up the rounds."""
    took_s = {(run.engine, run.duration_s, run.round): run.song_s for run in runs}
    cases = dict.fromkeys((run.engine, run.duration_s) for run in runs)
    return [_summarize([run for run in runs if (run.engine, run.duration_s) == case], took_s) for case in cases]


def _summarize(runs: Sequence[Run], took_s: Mapping[tuple[str, int, int], float]) -> Summary:
    """Sum up an engine's songs of one length."""

    def times(other: str) -> list[float]:
        return [took_s[other, run.duration_s, run.round] / run.song_s for run in runs]

    engine = runs[0].engine
    return Summary(
        engine=engine,
        duration_s=runs[0].duration_s,
        song_s=spread([run.song_s for run in runs]),
        first_audio_s=spread([run.first_audio_s for run in runs]),
        times_baseline=spread(times(BASELINE)),
        share_of_one_process=spread([1 / ratio for ratio in times(ONE_PROCESS)]),
        times_in_turn=spread(times(IN_TURN)) if engine == OVERLAPPING else None,
    )


def make_table(summaries: Sequence[Summary]) -> Table:
    """Lay the figures out for people."""
    table = Table(title="a whole song: median (least–most)")
    headings = ["way", "song, s", "took, s", "first audio, s"]
    headings += [f"times as fast as {BASELINE}", f"share of {ONE_PROCESS}"]
    if any(one.times_in_turn for one in summaries):
        headings.append(f"times as fast as {IN_TURN}")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "way" else "right", overflow="fold")
    for one in summaries:
        figures = [one.song_s, one.first_audio_s, one.times_baseline, one.share_of_one_process]
        if one.times_in_turn:
            figures.append(one.times_in_turn)
        table.add_row(one.engine, str(one.duration_s), *map(str, figures))
    return table


def write_report(folder: Path, plan: Plan, runs: Sequence[Run]) -> list[Path]:
    """Write song-SIZE.json, and a picture where matplotlib is installed; returns the files."""
    summaries = summarize(runs)
    report = {
        "machine": name_machine("cpu", plan.threads),
        "size": plan.size,
        "steps": STEPS,
        "dtype": "float32",
        "together": plan.together,
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }
    return write_figures(folder, f"song-{plan.size}", report, lambda figure: _draw(figure, summaries))


def _draw(figure: "Figure", summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    labels = [
        f"{one.engine}, {one.duration_s} s"
        + (f"\n{one.times_in_turn} times as fast as in turn" if one.times_in_turn else "")
        for one in summaries
    ]
    axes.barh(labels, [one.song_s.median for one in summaries], color="tab:blue", label="a song")
    # Thinner: songs that overlap may be first heard later than one takes in the mean.
    first_s = [one.first_audio_s.median for one in summaries]
    axes.barh(labels, first_s, 0.4, color="tab:orange", label="until first audio")
    axes.set(xlabel="seconds")
    axes.invert_yaxis()
    axes.legend()
