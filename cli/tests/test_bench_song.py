"""soundstage bench song: three ways to make the same song, measured side by side."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from soundstage_cli.bench.command import app
from soundstage_cli.bench.song import BASELINE, ONE_PROCESS, OURS, Run, summarize


def test_measures_a_tiny_song_made_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    options = ["--size", "tiny", "--seconds", "2", "--rounds", "1", "--threads", "1", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["song", *options])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "song-tiny.json").read_text())
    assert [run["engine"] for run in report["runs"]] == [BASELINE, ONE_PROCESS, OURS]
    assert all(0 < run["first_audio_s"] <= run["song_s"] for run in report["runs"])
    assert (tmp_path / "song-tiny.png").read_bytes().startswith(b"\x89PNG")
    assert "a whole song" in done.output


def test_a_songs_ratios_are_taken_within_a_round() -> None:
    # The machine halves its speed between the rounds; the ratios stay.
    runs = [
        Run(engine=name, duration_s=9, round=number, song_s=taken_s * number, first_audio_s=1.0)
        for number in (1, 2)
        for name, taken_s in ((BASELINE, 6.0), (ONE_PROCESS, 4.0), (OURS, 3.0))
    ]
    ours = summarize(runs)[2]
    assert (ours.times_baseline.least, ours.times_baseline.most) == (2.0, 2.0)
    assert (ours.share_of_one_process.least, ours.share_of_one_process.most) == (0.75, 0.75)


def test_refuses_a_song_of_a_size_it_does_not_know() -> None:
    assert CliRunner().invoke(app, ["song", "--size", "huge"]).exit_code == 2
