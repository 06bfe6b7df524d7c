"""`soundstage doctor`, as it is called."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from soundstage_budget.cards import Card, find_card
from soundstage_cli.app import app
from soundstage_cli.doctor import read_card, shrink


def doctor(*arguments: str, max_vram: str | None = None) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments], env={"MAX_CUDA_VRAM": max_vram, "COLUMNS": "160"})


def test_a_card_its_tier_its_plans_and_what_is_given_up() -> None:
    answer = doctor("--card", "RTX 3060 12GB", "--lm", "4B")
    assert answer.exit_code == 0
    first, *_ = answer.stdout.splitlines()
    assert first == "RTX 3060 12GB: capability 8.6, 11.6 GiB, 11.14 GiB of it to share; tier 5"
    rows = [line.split("│")[1:-1] for line in answer.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row][:4] for row in rows] == [
        ["lm", "1.7B", "vllm bfloat16", "none"],
        ["dit", "turbo", "bfloat16 int8", "model"],
        ["vae", "oobleck", "float32", "model"],
    ]
    assert "given up: language model: 4B asked, 1.7B fits a card of tier 5" in answer.stdout
    assert "next: a card of 16 GB would have" in answer.stdout


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    answer = doctor("--card", "RTX 3060 12GB")
    bars = [line.split()[:2] for line in answer.stdout.splitlines() if "·" in line]
    assert [name for name, _ in bars] == ["lm", "dit", "vae"]
    assert {len(cells) for _, cells in bars} == {60}
    lm = bars[0][1]
    assert lm.count("█") == pytest.approx(60 * 4.04 / 11.14, abs=1)
    assert 60 - lm.count("·") == pytest.approx(60 * 6.16 / 11.14, abs=1)


def test_json_has_every_byte() -> None:
    told = json.loads(doctor("--card", "H100", "--json").stdout)
    assert told["tier"]["name"] == "unlimited"
    assert [plan["service"] for plan in told["plans"]] == ["lm", "dit", "vae"]
    assert all(sum(plan["need"].values()) == plan["budget_bytes"] for plan in told["plans"])


def test_a_large_card_is_made_small_by_the_environment() -> None:
    answer = doctor("--card", "H100", max_vram="8")
    assert answer.stdout.startswith(
        "H100 80GB, as if of 8 GB: capability 9.0, 8.0 GiB, 7.68 GiB of it to share; tier 4"
    )
    assert shrink(find_card("RTX 3080"), "40").memory_gib == find_card("RTX 3080").memory_gib
    assert shrink(Card(memory_gib=64), "8").capability is not None


def test_budgets_that_do_not_add_up_are_refused_with_their_sum() -> None:
    answer = doctor("--card", "RTX 3080", "--gpu-memory", "lm=4GiB", "--gpu-memory", "dit=6GiB")
    assert answer.exit_code == 1
    assert "lm 4.00 GiB + dit 6.00 GiB = 10.00 GiB, but RTX 3080 10GB has 9.31 GiB to share" in answer.stderr


def test_budgets_that_add_up_are_kept_to() -> None:
    answer = doctor("--card", "RTX 3080", "--gpu-memory", "lm=4GiB", "--gpu-memory", "dit=0.4", "--json")
    told = json.loads(answer.stdout)
    assert [(plan["service"], plan["budget_bytes"]) for plan in told["plans"]] == [
        ("lm", 4 << 30),
        ("dit", int(0.4 * told["usable_bytes"])),
    ]
    assert all(sum(plan["need"].values()) <= plan["budget_bytes"] for plan in told["plans"])


@pytest.mark.parametrize(
    ("arguments", "max_vram", "words"),
    [
        (["--card", "RTX 9999"], None, "names no cards; must be one of"),
        (["--lm", "7B"], None, "'7B'; must be one of auto, none, 0.6B, 1.7B, 4B"),
        (["--dit", "xxl"], None, "must be one of turbo"),
        (["--gpu-memory", "gateway=1GiB"], None, "must be lm=, dit= or vae=, each once"),
        (["--gpu-memory", "lm=1GiB", "--gpu-memory", "lm=2GiB"], None, "each once"),
        (["--gpu-memory", "lm=lots"], None, "lm: 'lots' is no amount of memory"),
        ([], "much", "is 'much'; must be a number of GB"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_would_do(
    arguments: list[str], max_vram: str | None, words: str
) -> None:
    answer = doctor(*arguments, max_vram=max_vram)
    assert answer.exit_code == 2
    assert words in " ".join(answer.stderr.replace("│", " ").split())


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "memory.png"
    assert doctor("--card", "RTX 3080", "--plot", str(path)).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["none/memory.png", "memory.txt"])
def test_a_picture_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    answer = doctor("--card", "RTX 3080", "--plot", str(tmp_path / name))
    assert answer.exit_code == 2
    assert "cannot be written" in " ".join(answer.stderr.split())


def test_what_a_driver_answers_is_read() -> None:
    card = Card(name="NVIDIA H200", memory_gib=143771 / 1024, capability=(9, 0))
    assert read_card("NVIDIA H200, 143771, 9.0\nNVIDIA H200, 143771, 9.0\n") == card
    rocm = read_card("AMD Instinct MI300X,196592.0,9.4,1\n")
    assert rocm is not None
    assert rocm.is_rocm
    assert read_card("No devices were found\n") is None
    assert read_card("") is None
