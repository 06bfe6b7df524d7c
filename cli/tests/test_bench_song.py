"""soundstage bench song: three ways to make the same song, and several songs that overlap, measured side by side."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from soundstage_cli.bench.command import app
from soundstage_cli.bench.report import Spread
from soundstage_cli.bench.song import (
    BASELINE,
    BASELINE_COMPILED,
    BASELINE_KEPT,
    IN_TURN,
    ONE_PROCESS,
    OURS,
    OVERLAPPING,
    Run,
    Way,
    clock,
)
from soundstage_cli.bench.song_report import summarize


@pytest.mark.soak
def test_measures_a_tiny_song_made_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--size", "tiny", "--seconds", "2", "--rounds", "1", "--threads", "1", "--together", "2"]
    folders = ["--output", str(tmp_path), "--cache", str(tmp_path / "cache")]
    done = CliRunner().invoke(app, ["song", *options, *folders])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "song-tiny-cpu-float32-2s.json").read_text())
    assert [run["engine"] for run in report["runs"]] == [
        BASELINE,
        BASELINE_KEPT,
        ONE_PROCESS,
        OURS,
        IN_TURN,
        OVERLAPPING,
    ]
    assert all(0 < run["first_audio_s"] <= run["song_s"] for run in report["runs"][:4])
    assert [list(one["times"]) for one in report["summaries"]] == [
        [],
        [],
        [BASELINE, BASELINE_KEPT],
        [BASELINE, BASELINE_KEPT, ONE_PROCESS],
        [],
        [IN_TURN],
    ]
    assert (tmp_path / "song-tiny-cpu-float32-2s.png").read_bytes().startswith(b"\x89PNG")
    assert "a whole song" in done.output


@pytest.mark.parametrize(("is_overlapping", "what_follows"), [(False, "1 done"), (True, "2 ordered")])
async def test_a_song_is_ordered_when_the_one_before_is_done_or_heard(is_overlapping: bool, what_follows: str) -> None:
    told: list[str] = []

    async def tell(what: str) -> None:
        told.append(what)
        for _ in range(9):  # a song that does not wait for this one has its turn
            await asyncio.sleep(0)

    async def make(duration_s: int, seed: int) -> AsyncIterator[int]:
        await tell(f"{seed} ordered")
        told.append(f"{seed} heard")
        yield duration_s * 48_000
        await tell(f"{seed} played")
        told.append(f"{seed} done")

    await clock("fake", Way(make=make, num_songs=2, is_overlapping=is_overlapping), 1, 1)
    assert told[:4] == ["1 ordered", "1 heard", "1 played", what_follows]


def test_a_songs_ratios_are_taken_within_a_round() -> None:
    # The machine halves its speed between the rounds; the ratios stay. The compiled one is there in the second alone.
    runs = [
        Run(engine=name, duration_s=9, round=number, song_s=taken_s * number, first_audio_s=taken_s * number / share)
        for number in (1, 2)
        for name, taken_s, share in (
            (BASELINE, 6.0, 1),
            (ONE_PROCESS, 4.0, 4),
            (OURS, 3.0, 1.5),
            (IN_TURN, 3.5, 1),
            (OVERLAPPING, 2.8, 1),
        )
    ]
    runs.append(Run(engine=BASELINE_COMPILED, duration_s=9, round=2, song_s=9.0, first_audio_s=9.0))
    _, one_process, ours, in_turn, overlapping, _ = summarize(runs)
    assert ours.times == {
        BASELINE: Spread(median=2.0, least=2.0, most=2.0),
        BASELINE_COMPILED: Spread(median=1.5, least=1.5, most=1.5),
        ONE_PROCESS: Spread(median=4 / 3, least=4 / 3, most=4 / 3),
    }
    assert ours.share_of_one_process == Spread(median=0.75, least=0.75, most=0.75)
    assert ours.first_audio_sooner == Spread(median=0.5, least=0.5, most=0.5)
    assert (one_process.share_of_one_process, one_process.first_audio_sooner) == (None, None)
    assert in_turn.times == {}
    assert overlapping.times == {IN_TURN: Spread(median=1.25, least=1.25, most=1.25)}


def test_refuses_a_song_of_a_size_it_does_not_know() -> None:
    assert CliRunner().invoke(app, ["song", "--size", "huge"]).exit_code == 2
