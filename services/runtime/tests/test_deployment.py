"""Three services on a card: one row for each card, and what is said of what it cannot do."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage_budget.admit import BudgetsDoNotAddUpError, admit, usable_bytes
from soundstage_budget.cards import CARDS, GIB, Card, UnknownCardError, find_card
from soundstage_budget.deployment import Wishes, deploy
from soundstage_budget.need import Offload
from soundstage_budget.plan import DoesNotFitError, Plan, Service
from soundstage_budget.single_card import Terms


def by_service(plans: tuple[Plan, ...]) -> dict[Service, Plan]:
    return {plan.service: plan for plan in plans}


@pytest.mark.parametrize(
    ("name", "tier", "lm", "engine", "dtype", "offload", "batch", "minutes"),
    [
        ("GTX 980 Ti 6GB", "3", "", "", "float32", "model", 2, 10),
        ("GTX 1060 3GB", "1", "", "", "float32", "layer", 1, 4),
        ("GTX 1060 6GB", "3", "", "", "float32", "model", 2, 10),
        ("GTX 1080 8GB", "4", "", "", "float32", "model", 4, 10),
        ("GTX 1080 Ti 11GB", "4", "0.6B", "torch", "float32", "layer", 1, 8),
        ("TITAN Xp 12GB", "5", "0.6B", "torch", "float32", "model", 1, 8),
        ("Tesla P100 16GB", "6a", "1.7B", "torch", "float32", "layer", 1, 8),
        ("Tesla V100 16GB", "6a", "1.7B", "torch", "float16", "none", 2, 8),
        ("Tesla V100 32GB", "unlimited", "4B", "torch", "float16", "none", 8, 10),
        ("GTX 1650 4GB", "1", "", "", "float16", "model", 1, 6),
        ("RTX 2060 6GB", "3", "0.6B", "torch", "float16", "layer", 1, 6),
        ("RTX 2080 Ti 11GB", "4", "0.6B", "vllm", "float16", "none", 1, 8),
        ("Tesla T4 16GB", "5", "1.7B", "vllm", "float16", "none", 2, 8),
        ("RTX 3050 8GB", "4", "0.6B", "vllm", "bfloat16", "model", 1, 8),
        ("RTX 3060 12GB", "5", "1.7B", "vllm", "bfloat16", "model", 2, 8),
        ("RTX 3080 10GB", "4", "0.6B", "vllm", "bfloat16", "model", 2, 8),
        ("RTX A4000 16GB", "6a", "1.7B", "vllm", "bfloat16", "none", 4, 8),
        ("RTX A4500 20GB", "6b", "1.7B", "vllm", "bfloat16", "none", 4, 8),
        ("A10 24GB", "6b", "1.7B", "vllm", "bfloat16", "none", 8, 8),
        ("RTX 3090 24GB", "unlimited", "4B", "vllm", "bfloat16", "none", 4, 10),
        ("A100 40GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
        ("A100 80GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
        ("RTX 4060 8GB", "4", "0.6B", "vllm", "bfloat16", "model", 1, 8),
        ("RTX 4060 Ti 16GB", "6a", "1.7B", "vllm", "bfloat16", "none", 4, 8),
        ("RTX 4070 12GB", "5", "1.7B", "vllm", "bfloat16", "model", 2, 8),
        ("RTX 4090 24GB", "unlimited", "4B", "vllm", "bfloat16", "none", 4, 10),
        ("L4 24GB", "6b", "1.7B", "vllm", "bfloat16", "none", 8, 8),
        ("L40S 48GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
        ("H100 80GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
        ("H200 141GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
        ("B200 180GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
        ("RTX 5070 12GB", "5", "1.7B", "vllm", "bfloat16", "model", 2, 8),
        ("RTX 5090 32GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
        ("MI300X 192GB", "unlimited", "4B", "vllm", "bfloat16", "none", 8, 10),
    ],
)
def test_what_each_card_runs(
    name: str, tier: str, lm: str, engine: str, dtype: str, offload: Offload, batch: int, minutes: int
) -> None:
    deployment = deploy(find_card(name), Wishes())
    plans = by_service(deployment.plans)
    assert deployment.tier.name == tier
    assert (plans["lm"].variant, plans["lm"].engine) == (lm, engine) if lm else "lm" not in plans
    dit = plans["dit"]
    assert (dit.dtype, dit.offload, dit.max_batch) == (dtype, offload, batch)
    assert min(plan.max_duration_s for plan in deployment.plans) == 60 * minutes
    assert dit.quantization == ("int8" if deployment.tier.is_int8 else "none")
    assert plans["vae"].dtype == "float32"


@given(st.floats(3.5, 100), st.sampled_from([(6, 1), (7, 5), (8, 6), (12, 0)]), st.sampled_from(["turbo", "xl-base"]))
def test_no_deployment_takes_more_than_its_card(memory_gib: float, capability: tuple[int, int], dit: str) -> None:
    card = Card(name="a card", memory_gib=memory_gib, capability=capability)
    deployment = deploy(card, Wishes(dit=dit))
    assert deployment.used_bytes <= deployment.usable_bytes < card.memory_bytes
    assert all(plan.need.peak <= plan.budget_bytes for plan in deployment.plans)


@pytest.mark.parametrize("memory_gib", [8.0, 12.0, 16.0, 24.0])
def test_the_budgets_of_a_shared_card_are_admitted_again(memory_gib: float) -> None:
    card = Card(name="a card", memory_gib=memory_gib, capability=(8, 6))
    shared = deploy(card, Wishes())
    budgets: dict[Service, int] = {plan.service: plan.budget_bytes for plan in shared.plans}
    assert set(budgets) == {"lm", "dit", "vae"}
    within = deploy(card, Wishes(), budgets)
    assert all(plan.need.peak <= budgets[plan.service] for plan in within.plans)
    assert by_service(within.plans)["lm"].variant == by_service(shared.plans)["lm"].variant


def test_budgets_that_are_more_than_the_card_are_refused_with_their_sum() -> None:
    card = find_card("RTX 3060 12GB")
    with pytest.raises(
        BudgetsDoNotAddUpError,
        match=r"lm 6\.00 GiB \+ dit 5\.00 GiB \+ vae 1\.00 GiB = 12\.00 GiB, "
        r"but RTX 3060 12GB has 11\.14 GiB to share; 0\.86 GiB less would do",
    ):
        admit(card, {"lm": 6 * GIB, "dit": 5 * GIB, "vae": GIB})
    admit(card, {"lm": usable_bytes(card)})


def test_a_budget_too_small_for_anything_is_refused_with_the_figures() -> None:
    with pytest.raises(
        DoesNotFitError, match=r"gives lm 1\.00 GiB; 0\.6B in bfloat16 needs at least .* \(weights 1\.23"
    ):
        deploy(find_card("RTX 3060"), Wishes(), {"lm": GIB})


@pytest.mark.parametrize(
    ("card", "wishes", "words"),
    [
        ("RTX 3060 12GB", Wishes(lm="4B"), "language model: 4B asked, 1.7B fits a card of tier 5"),
        ("RTX 2060", Wishes(dit="xl-turbo"), "diffusion model: xl-turbo asked, turbo fits a card of tier 3"),
        (
            "RTX 2060",
            Wishes(terms=Terms(engine="vllm")),
            "engine: vllm asked, torch is used: vLLM wants a card of 8 GB, this one has 5.8",
        ),
        (
            "GTX 1080 Ti",
            Wishes(terms=Terms(engine="vllm")),
            "engine: vllm asked, torch is used: vLLM needs compute capability 7.5",
        ),
        ("RTX 3060 12GB", Wishes(terms=Terms(max_duration_s=600)), "lm: longest song in seconds: 600 asked, 480 fits"),
        ("RTX 3060 12GB", Wishes(terms=Terms(max_batch=8)), "dit: songs at once: 8 asked, 2 fits"),
        ("RTX 3060 12GB", Wishes(), "dit: speed: networks leave the card when they are idle"),
        ("GTX 1650", Wishes(lm="0.6B"), "language model: 0.6B asked, none fits a card of tier 1"),
        ("GTX 1650", Wishes(), "language model: none is planned at tier 1"),
    ],
)
def test_what_a_card_cannot_do_is_said_and_the_nearest_is_done(card: str, wishes: Wishes, words: str) -> None:
    assert any(told.startswith(words) for told in deploy(find_card(card), wishes).given_up)


def test_a_card_that_can_all_gives_nothing_up() -> None:
    wishes = Wishes(lm="4B", dit="xl-base", terms=Terms(max_batch=8, max_duration_s=600))
    assert deploy(find_card("H100"), wishes).given_up == ()


def test_xl_on_a_card_of_twelve_gigabytes_is_offloaded_and_int8() -> None:
    dit = by_service(deploy(find_card("RTX 3060 12GB"), Wishes(dit="xl-turbo")).plans)["dit"]
    assert (dit.variant, dit.quantization) == ("xl-turbo", "int8")
    assert dit.offload != "none"


def test_a_machine_without_a_card_gives_up_no_precision() -> None:
    deployment = deploy(Card(memory_gib=23.5), Wishes())
    assert by_service(deployment.plans)["dit"].quantization == "none"
    assert deployment.given_up == ("language model: none is planned at tier 1",)


def test_no_card_has_the_limits_of_the_lowest_tier() -> None:
    deployment = deploy(Card(memory_gib=64), Wishes())
    dit = by_service(deployment.plans)["dit"]
    assert (deployment.tier.name, dit.dtype, dit.max_batch, dit.max_duration_s) == ("1", "float32", 1, 360)


@pytest.mark.parametrize("name", [card.name for card in CARDS])
def test_every_card_is_found_by_its_name(name: str) -> None:
    assert find_card(name.lower().replace("gb", " gb")).name == name


@pytest.mark.parametrize(("name", "count"), [("RTX 4060", "2"), ("RTX 9999", "no"), ("", "no")])
def test_a_name_that_is_not_one_card_is_refused_with_the_choice(name: str, count: str) -> None:
    with pytest.raises(
        UnknownCardError, match=f"is '{name}', which names {count} cards; must be one of .*RTX 4060 8GB"
    ):
        find_card(name)


def test_a_smaller_card_of_the_same_kind_never_runs_a_larger_planner() -> None:
    card = find_card("H200")
    sizes = ["", "0.6B", "1.7B", "4B"]
    planners = [by_service(deploy(replace(card, memory_gib=gib), Wishes()).plans).get("lm") for gib in range(4, 40)]
    ranks = [sizes.index(plan.variant if plan else "") for plan in planners]
    assert ranks == sorted(ranks)
