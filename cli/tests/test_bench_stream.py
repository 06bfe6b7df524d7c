"""soundstage bench stream, and the playback it simulates."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from soundstage_cli.app import app
from soundstage_cli.bench.playback import Playback, draw_starts, find_load, gather, play, spread_starts
from soundstage_cli.bench.stream import Comparison, Run
from soundstage_cli.bench.stream_report import compare
from soundstage_cli.tiny.vae import write_vae

from .conftest import Keeping

FEW_S = st.floats(0.01, 10)


def test_music_runs_dry_when_a_piece_comes_after_the_last_one_has_been_played() -> None:
    # Played from 12 to 14; silent to 15, played to 16; a second piece in time to 17; silent to 17.5.
    heard = play(10.0, [(12.0, 2.0), (15.0, 1.0), (15.5, 1.0), (17.5, 1.0)])
    assert (heard.first_audio_s, heard.gaps_s) == (2.0, [1.0, 0.5])
    assert heard.worst_wait_s == 2.0
    assert play(10.0, [(10.5, 1.0), (12.5, 1.0)]).worst_wait_s == 1.0


@given(st.lists(st.tuples(FEW_S, FEW_S), min_size=1), FEW_S)
def test_what_is_played_and_waited_for_adds_up(pieces: list[tuple[float, float]], begun_s: float) -> None:
    now_s, arrivals = begun_s, list[tuple[float, float]]()
    for after_s, length_s in pieces:
        now_s += after_s
        arrivals.append((now_s, length_s))
    heard = play(begun_s, arrivals)
    length_s = sum(length_s for _, length_s in arrivals)
    end_s = begun_s + heard.first_audio_s + sum(heard.gaps_s) + length_s
    assert end_s >= now_s + arrivals[-1][1] - 1e-6  # nothing is heard before it has come
    # A listener who begins that much later never runs dry.
    place_s = begun_s + heard.first_audio_s + sum(heard.gaps_s)
    for came_s, piece_s in arrivals:
        assert came_s <= place_s + 1e-6
        place_s += piece_s
    assert min(heard.gaps_s, default=1) > 0


def test_an_audience_is_the_sum_of_its_listeners() -> None:
    heard = gather([Playback(first_audio_s=1, gaps_s=[3, 0.5]), Playback(first_audio_s=2, gaps_s=[])])
    assert (heard.listeners, heard.first_audio_p50_s, heard.underruns, heard.underrun_s) == (2, 1.5, 2, 3.5)
    assert (heard.worst_gap_s, heard.worst_wait_s, heard.waited_s) == (3, 3, 6.5)


def test_the_load_is_what_has_been_played_of_what_could_be_decoded() -> None:
    # Both play all the time: twice what is decoded at speed 1, and just what is decoded at speed 2.
    assert find_load([0, 0], 10, speed=1) == pytest.approx(2)
    assert find_load([0, 0], 10, speed=2) == pytest.approx(1)
    # One after the other: never more than one song at once.
    assert find_load([0, 10], 10, speed=1) == pytest.approx(1)
    # Up to 10 s 10 s and 5 s have been played, up to 15 s both songs.
    assert find_load([0, 5], 10, speed=1) == pytest.approx(1.5)


@example(2, True, 3.0, 0.5)  # drawn close together: a pattern that must be stretched far
@given(st.integers(2, 60), st.booleans(), st.floats(0.5, 20), st.floats(0.3, 1.0))
def test_listeners_come_as_fast_as_the_load_allows(count: int, is_poisson: bool, speed: float, load: float) -> None:
    pattern = draw_starts(count, is_poisson=is_poisson, seed=count)
    assert pattern[0] == 0
    assert pattern == sorted(pattern)
    starts = spread_starts(pattern, 20, speed, load)
    found = find_load(starts, 20, speed)
    if count / speed <= load:
        assert starts[-1] < 1e-6
    elif 1 / speed < load * 0.9:
        assert found == pytest.approx(load, rel=1e-3)


def test_orders_are_compared_within_a_round() -> None:
    def run(order: str, number: int, wait_s: float) -> Run:
        heard = [Playback(first_audio_s=wait_s, gaps_s=[2 * wait_s])]
        return Run(order=order, round=number, audience=gather(heard), waited_s=[wait_s])  # pyright: ignore[reportArgumentType]

    # The machine halves its speed in the second round; first-come waits four times as long in both.
    runs = [run("first-come", 1, 4), run("earliest-dry", 1, 1), run("earliest-dry", 2, 2), run("first-come", 2, 8)]
    ratios = compare(Comparison(speed=1, window_s=1, runs=runs))
    assert (ratios.waited.least, ratios.waited.most, ratios.worst_wait.median) == (4, 4, 4)


def test_measures_a_gateway_and_a_tiny_codec(
    gateway: str, keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    for name in ("acestep-5Hz-lm-1.7B", "acestep-v15-turbo", "vae"):
        (tmp_path / "models" / "original" / name).mkdir(parents=True)
    write_vae(tmp_path / "models" / "original" / "vae")
    options = ["--listeners", "3", "--seconds", "1", "--gap", "0.01", "--rounds", "1", "--load", "2", "--threads", "1"]
    folders = ["--output", str(tmp_path / "figures"), "--models", str(tmp_path / "models")]
    done = CliRunner().invoke(app, ["bench", "stream", *options, *folders, "--gateway", gateway])
    assert done.exit_code == 0, done.output
    assert len(keeping.created) == 1 + 3  # one is a rehearsal
    report = json.loads((tmp_path / "figures" / "stream-3x1s-load-2.json").read_text())
    assert report["summaries"][0]["listeners"] == 3
    assert 0 < report["summaries"][0]["first_audio_p50_s"] <= report["summaries"][0]["worst_wait_s"]
    assert [(run["round"], run["order"]) for run in report["runs"]] == [(1, "first-come"), (1, "earliest-dry")]
    for run in report["runs"]:
        assert run["audience"]["listeners"] == len(run["waited_s"]) >= 3
        assert 0 < run["audience"]["first_audio_p50_s"] <= run["audience"]["worst_wait_s"]
    assert (tmp_path / "figures" / "stream-3x1s-load-2.png").read_bytes().startswith(b"\x89PNG")
    assert "times as long as earliest-dry" in done.output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--arrivals", "uniform"], "is 'uniform'; must be one of poisson, equal"),
        (["--seconds", "0.5"], "greater than or equal to 1"),
        (["--load", "0"], "greater than or equal to 0.1"),
    ],
)
def test_refuses_what_cannot_be_simulated(options: list[str], complaint: str) -> None:
    done = CliRunner().invoke(app, ["bench", "stream", *options])
    assert (done.exit_code, complaint in " ".join(done.stderr.replace("│", " ").split())) == (2, True)


def test_a_gateway_that_does_not_answer_is_named(tmp_path: Path) -> None:
    for name in ("acestep-5Hz-lm-1.7B", "acestep-v15-turbo", "vae"):
        (tmp_path / "original" / name).mkdir(parents=True)
    done = CliRunner().invoke(app, ["bench", "stream", "--models", str(tmp_path), "--gateway", "127.0.0.1:1"])
    assert (done.exit_code, "No gateway answers" in done.stderr) == (1, True)
