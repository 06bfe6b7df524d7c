"""`soundstage profile`, as it is called: the half that is arithmetic. tests/budget has the one that measures."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text
from typer.testing import CliRunner, Result

from soundstage_cli.app import app
from soundstage_cli.profile import show_batches


def profile(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["profile", *arguments], env={"COLUMNS": "200"})


def written(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "profile.json"
    answer = profile(*arguments, "--json", str(path))
    assert answer.exit_code == 0, answer.output
    return json.loads(path.read_text())


def test_every_tier_has_its_plans_and_their_bytes(tmp_path: Path) -> None:
    rows = written(tmp_path, "--with-lm")["predicted"]
    assert [(row["memory_gib"], row["tier"]) for row in rows] == [
        (4, "1"),
        (6, "3"),
        (8, "4"),
        (12, "5"),
        (16, "6a"),
        (20, "6b"),
        (24, "unlimited"),
    ]
    planners = [plan["variant"] for row in rows for plan in row["plans"] if plan["service"] == "lm"]
    assert planners == ["0.6B", "0.6B", "1.7B", "1.7B", "1.7B", "4B"]
    for row in rows:
        assert sum(plan["peak_bytes"] for plan in row["plans"]) <= row["memory_gib"] * 2**30
        assert all(plan["peak_bytes"] == sum(plan["need"].values()) for plan in row["plans"])


@pytest.mark.parametrize(
    "arguments", [["--tiers", "4", "6", "8"], ["--tiers", "4,6", "--tiers", "8"], ["--tiers", "4, 6", "8"]]
)
def test_tiers_are_listed_with_spaces_or_commas(tmp_path: Path, arguments: list[str]) -> None:
    rows = written(tmp_path, *arguments, "--with-lm")["predicted"]
    assert [row["memory_gib"] for row in rows] == [4, 6, 8]
    assert any(plan["service"] == "lm" for plan in rows[-1]["plans"])


def test_without_the_language_model_songs_are_longer(tmp_path: Path) -> None:
    [row] = written(tmp_path, "--tiers", "8")["predicted"]
    assert [(plan["service"], plan["max_duration_s"]) for plan in row["plans"]] == [("dit", 600), ("vae", 600)]


def test_a_tier_too_small_for_any_song_is_told_of(tmp_path: Path) -> None:
    answer = profile("--tiers", "1,24")
    assert answer.exit_code == 0
    assert "1 GB: a card of 1 GB has 0.96 GiB to share, too little for any song" in answer.stderr


def test_prediction_alone_says_that_it_is(tmp_path: Path) -> None:
    told = written(tmp_path, "--tiers", "8", "--tiers", "6")
    assert [row["memory_gib"] for row in told["predicted"]] == [6, 8]
    assert told["note"].startswith("predicted, not measured: ")
    assert "measured" not in told


def test_boundaries_are_where_nothing_need_be_given_up(tmp_path: Path) -> None:
    found = written(tmp_path, "--boundary")["boundary"]
    assert found["with_lm"] == {"default": 6, "no-quant": 6, "no-offload": 12}
    assert found["without_lm"] == {"default": 4, "no-quant": 4, "no-offload": 8}
    assert written(tmp_path, "--boundary", "--tiers", "4")["boundary"]["with_lm"]["default"] is None


def test_a_larger_card_makes_no_fewer_songs_at_once(tmp_path: Path) -> None:
    rows = written(tmp_path, "--batch-boundary")["batch_boundary"]
    for name in ("with_lm", "without_lm"):
        batches = [row[name] for row in rows]
        assert batches == sorted(batches)
        assert batches[-1] == 8
    assert rows[0]["with_lm"] == 0
    assert rows[0]["without_lm"] == 1


def test_the_most_at_once_says_how_it_comes_to_be_more_than_planned(capsys: pytest.CaptureFixture[str]) -> None:
    show_batches([{"memory_gib": 12, "with_lm": 4, "without_lm": 4}])
    assert "more than in the plans above takes more offloading" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tiers", "6,large"], "is '6 large'; must be GB of cards, as 6,8,16"),
        (["--tiers", "0"], "is '0'; must be GB of cards"),
        (["--tiers", "8", "many"], "is '8 many'; must be GB of cards"),
        (["--tiers", "8", "--models", "/nowhere"], "/nowhere is not laid out as the hub is"),
        (["--tiers", "8", "--json", "/nowhere/profile.json"], "--json': is '/nowhere/profile.json', which cannot be"),
    ],
)
def test_what_cannot_be_read_or_written_is_refused(arguments: list[str], words: str) -> None:
    answer = profile(*arguments)
    assert answer.exit_code == 2
    assert words in " ".join(Text.from_ansi(answer.stderr).plain.replace("│", " ").split())
