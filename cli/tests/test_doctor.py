"""`soundstage doctor`, as it is called."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from soundstage_budget.cards import Card, find_card
from soundstage_cli.app import app
from soundstage_cli.doctor import Found, probe, read_card, shrink


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
        ["vae", "oobleck", "float32", "none"],
    ]
    assert "given up: language model: 4B asked, 1.7B fits a card of tier 5" in answer.stdout
    assert "next: a card of 16 GB would have" in answer.stdout
    flags = "--gpu-memory 3151MiB --max-in-flight 2 --quantization int8 --offload model --max-duration-s 600"
    assert f"python -m soundstage_dit --model MODEL {flags}\n" in answer.stdout


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    answer = doctor("--card", "RTX 3060 12GB")
    bars = [line.split()[:2] for line in answer.stdout.splitlines() if "·" in line]
    assert [name for name, _ in bars] == ["lm", "dit", "vae"]
    assert {len(cells) for _, cells in bars} == {60}
    lm = bars[0][1]
    assert lm.count("█") == pytest.approx(60 * 3.45 / 11.14, abs=1)
    assert 60 - lm.count("·") == pytest.approx(60 * 6.19 / 11.14, abs=1)


def test_json_has_every_byte() -> None:
    told = json.loads(doctor("--card", "H100", "--json").stdout)
    assert told["tier"]["name"] == "unlimited"
    assert [plan["service"] for plan in told["plans"]] == ["lm", "dit", "vae"]
    assert all(0 <= plan["budget_bytes"] - sum(plan["need"].values()) < 1 << 20 for plan in told["plans"])
    assert told["flags"]["vae"].startswith("--gpu-memory ")


def test_a_large_card_is_made_small_by_the_environment() -> None:
    answer = doctor("--card", "H100", max_vram="8")
    assert answer.stdout.startswith(
        "H100 80GB, as if of 8 GB: capability 9.0, 8.0 GiB, 7.68 GiB of it to share; tier 4"
    )
    assert shrink(find_card("RTX 3080"), "40").memory_gib == find_card("RTX 3080").memory_gib
    assert shrink(Card(memory_gib=64), "8").capability is not None
    assert shrink(find_card("H100"), "") == find_card("H100")


def test_budgets_that_do_not_add_up_are_refused_with_their_sum() -> None:
    answer = doctor("--card", "RTX 3080", "--gpu-memory", "lm=4GiB", "--gpu-memory", "dit=6GiB")
    assert answer.exit_code == 1
    assert "lm 4.00 GiB + dit 6.00 GiB = 10.00 GiB, but RTX 3080 10GB has 9.31 GiB to share" in answer.stderr


def test_budgets_that_add_up_are_kept_to() -> None:
    answer = doctor("--card", "RTX 3080", "--gpu-memory", "lm=4GiB", "--gpu-memory", "dit=0.4", "--json")
    told = json.loads(answer.stdout)
    assert [(plan["service"], plan["budget_bytes"]) for plan in told["plans"]] == [
        ("lm", 4 << 30),
        ("dit", int(0.4 * find_card("RTX 3080").memory_bytes)),  # as its own process takes it
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--card", "RTX 3050 8GB", "--gpu-memory", "vae=1GiB"],
            "given up: language model: it has no budget, so none is planned",
        ),
        (
            ["--card", "GTX 1650 4GB", "--gpu-memory", "lm=1GiB"],
            "given up: language model: it has a budget of 1.00 GiB, but a card of tier 1 runs none",
        ),
        (
            ["--card", "RTX 3050 8GB", "--lm", "none", "--gpu-memory", "lm=1GiB"],
            "given up: language model: it has a budget of 1.00 GiB, but none is asked for",
        ),
    ],
)
def test_a_planner_that_is_not_planned_is_told_of_with_the_reason(arguments: list[str], words: str) -> None:
    answer = doctor(*arguments)
    assert answer.exit_code == 0
    assert words in answer.stdout
    assert ("nothing is planned" in answer.stdout) is ("vae=1GiB" not in arguments)


def test_what_a_driver_answers_is_read() -> None:
    card = Card(name="NVIDIA H200", memory_gib=143771 / 1024, capability=(9, 0))
    assert read_card("NVIDIA H200, 143771, 143000, 9.0\n") == Found(card=card, free_bytes=143000 << 20)
    rocm = read_card("AMD Instinct MI300X,196592.0,190000.0,9.4,1\n")
    assert rocm is not None
    assert rocm.card.is_rocm
    assert read_card("No devices were found\n") is None
    assert read_card("") is None


class Machine:
    """A machine whose driver and torch answer so, None where there is no such program."""

    def __init__(self, driver: str | None, torch: str | None) -> None:
        self._driver, self._torch = driver, torch

    def __call__(self, command: Sequence[str]) -> str | None:
        return self._driver if command[0] == "nvidia-smi" else self._torch


A10, H200 = "A10, 22600, 22000, 8.6\n", "NVIDIA H200, 143771, 143000, 9.0\n"


@pytest.mark.parametrize(
    ("machine", "visible", "name"),
    [
        (Machine(A10, None), None, "A10"),
        (Machine(A10 + H200, H200), None, "NVIDIA H200"),  # torch has its own order of several
        (Machine(A10 + H200, A10), "0", "A10"),
        (Machine(A10, ""), "", "CPU"),
        (Machine(A10 + H200, None), None, "A10"),  # without torch the driver's order must do
        (Machine(None, A10), None, "A10"),
        (Machine(None, None), None, "CPU"),
    ],
)
def test_of_several_cards_the_one_that_torch_would_take_is_found(
    monkeypatch: pytest.MonkeyPatch, machine: Machine, visible: str | None, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert probe(machine).card.name == name
