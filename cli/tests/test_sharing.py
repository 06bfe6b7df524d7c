"""A card that is shared: what others have of it, what variables ask for, and budgets that add up."""

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from soundstage_budget.admit import BudgetsDoNotAddUpError
from soundstage_budget.cards import Card, find_card
from soundstage_cli.app import app
from soundstage_cli.doctor import Found
from soundstage_cli.sharing import check_budgets, leave_out, leave_to_others, read_terms

GIB = 1 << 30
CARD = find_card("RTX 3060 12GB")


def left(card: Card, free_gib: float, asked_gib: float) -> tuple[float, str]:
    """How much of a card is shared, and what is said of it."""
    said = io.StringIO()
    console = Console(file=said, width=300)
    shared = leave_to_others(console, Found(card=card, free_bytes=int(free_gib * GIB)), int(asked_gib * GIB))
    return shared.memory_gib, said.getvalue()


def test_no_more_is_shared_than_other_processes_have_left() -> None:
    assert left(CARD, 11.5, 8) == (8, "")
    memory_gib, said = left(CARD, 5, 8)
    assert memory_gib == 5
    assert said == (
        "memory: 8.00 GiB asked + 6.60 GiB that other processes have = 14.60 GiB, but RTX 3060 12GB has 11.60 GiB; "
        "what is left is shared\n"
    )
    assert left(Card(memory_gib=16), 1, 8) == (8, "")  # of a machine's memory what is in use comes and goes


def test_what_the_stages_variables_ask_for_is_planned_and_not_overruled() -> None:
    environment = {
        "SOUNDSTAGE_DIT_QUANTIZATION": "none",
        "SOUNDSTAGE_DIT_OFFLOAD": "layer",
        "SOUNDSTAGE_LM_ENGINE": "rocket",  # for the stage to refuse
        "SOUNDSTAGE_DIT_GPU_MEMORY": "9GiB",
    }
    terms = read_terms(environment)
    assert (terms.quantization, terms.offload, terms.engine) == ("none", "layer", "auto")
    flags = ["--gpu-memory", "1MiB", "--quantization", "none", "--offload", "layer", "--max-in-flight", "2"]
    assert leave_out("dit", flags, environment) == ["--gpu-memory", "1MiB", "--max-in-flight", "2"]
    assert leave_out("vae", flags, environment) == flags


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SOUNDSTAGE_LM_GPU_MEMORY": "0.5", "SOUNDSTAGE_DIT_GPU_MEMORY": ""},
        {"SOUNDSTAGE_LM_GPU_MEMORY": "8GiB", "SOUNDSTAGE_DIT_GPU_MEMORY": "8GiB", "SOUNDSTAGE_DIT_DEVICE": "cuda:1"},
        {"SOUNDSTAGE_LM_GPU_MEMORY": "8GiB", "SOUNDSTAGE_DIT_GPU_MEMORY": "8GiB", "SOUNDSTAGE_LM_DEVICE": "cpu"},
    ],
)
def test_budgets_that_are_not_all_of_one_card_are_let_in(environment: dict[str, str]) -> None:
    check_budgets(environment, CARD)


def test_budgets_that_are_more_than_their_card_are_refused_with_their_sum() -> None:
    environment = {
        "SOUNDSTAGE_LM_GPU_MEMORY": "6GiB",
        "SOUNDSTAGE_DIT_GPU_MEMORY": "0.5",
        "SOUNDSTAGE_DIT_DEVICE": "cuda:0",
    }
    with pytest.raises(BudgetsDoNotAddUpError, match=r"lm 6\.00 GiB \+ dit 5\.80 GiB = 11\.80 GiB, but RTX 3060"):
        check_budgets(environment, CARD)


def test_up_refuses_them_before_anything_starts() -> None:
    environment = {f"SOUNDSTAGE_{name}_GPU_MEMORY": "0.6" for name in ("LM", "VAE")}
    done = CliRunner().invoke(app, ["up", "--port", "0"], env={**environment, "COLUMNS": "300"})
    assert done.exit_code == 1
    assert "lm " in done.stderr
    assert "to share" in done.stderr
    done = CliRunner().invoke(app, ["up", "--port", "0"], env={"SOUNDSTAGE_LM_GPU_MEMORY": "lots", "COLUMNS": "300"})
    assert done.exit_code == 2
    assert "SOUNDSTAGE_LM_GPU_MEMORY" in done.stderr
