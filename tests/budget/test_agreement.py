"""What a tool plans for a card is what the processes make of it: each is told its budget, and plans for itself."""

import pytest

from soundstage_budget.admit import usable_bytes
from soundstage_budget.cards import CARDS, Card
from soundstage_budget.deployment import Wishes, deploy
from soundstage_budget.engine_choice import choose_engine
from soundstage_budget.installed import ALL, Installed
from soundstage_budget.models import BYTES, DITS, LMS, VAE
from soundstage_budget.need import row_bytes
from soundstage_budget.plan import Plan, Service
from soundstage_budget.single_card import Terms
from soundstage_dit import size as dit_size
from soundstage_dit.settings import DitSettings
from soundstage_lm import size as lm_size
from soundstage_lm.settings import LmSettings
from soundstage_runtime.memory import parse_memory
from soundstage_runtime.settings import load_settings
from soundstage_vae import size as vae_size
from soundstage_vae.settings import VaeSettings

TIERS = [Card(name=f"a card of {gib} GB", memory_gib=gib, capability=(8, 0)) for gib in (4, 6, 8, 12, 16, 20, 24)]
BARE = Installed(vllm_version=None, has_torchao=False)
Outcome = tuple[str | int, ...]


def outcome_of(plan: Plan) -> Outcome:
    match plan.service:
        case "lm":
            return plan.engine, plan.max_duration_s, plan.max_batch
        case "dit":
            return plan.quantization, plan.offload, plan.max_duration_s, plan.max_batch, plan.max_tokens
        case "vae":
            return plan.offload, plan.window_frames, plan.max_tiles, plan.max_batch


def start_lm(plan: Plan, card: Card, budget_bytes: int, installed: Installed, arguments: list[str]) -> Outcome:
    settings = load_settings(LmSettings, arguments)
    kernels = "sm_{}{}".format(*card.capability or ())
    choice = choose_engine(card, torch_arch_list=(kernels,), vllm_version=installed.vllm_version, asked=settings.engine)
    model = LMS[plan.variant]  # pyright: ignore[reportArgumentType]
    found = lm_size.fit(settings, model, budget_bytes, engine=choice.engine, dtype=choice.dtype, card=card)
    row = row_bytes(model.shape, duration_s=plan.max_duration_s, itemsize=BYTES[plan.dtype])
    assert found.kv_cache_gb * 1e9 >= 2 * plan.max_batch * row
    assert found.kv_cache_gb * 1e9 <= plan.need.kv
    return choice.engine, found.max_duration_s, found.max_in_flight


def start_dit(plan: Plan, card: Card, budget_bytes: int, installed: Installed, arguments: list[str]) -> Outcome:
    found = dit_size.fit(
        load_settings(DitSettings, arguments),
        [DITS[plan.variant]],
        budget_bytes,
        dtype=plan.dtype,
        card=card,
        has_torchao=installed.has_torchao,
    )
    return found.quantization, found.offload, found.max_duration_s, found.max_in_flight, found.max_tokens


def start_vae(plan: Plan, card: Card, budget_bytes: int, _: Installed, arguments: list[str]) -> Outcome:
    found = vae_size.fit(load_settings(VaeSettings, arguments), VAE, budget_bytes, dtype=plan.dtype, card=card)
    return found.offload, found.window_frames, found.max_batch_tiles, found.max_in_flight


STARTS = {"lm": start_lm, "dit": start_dit, "vae": start_vae}


@pytest.mark.parametrize("installed", [ALL, BARE], ids=["all installed", "without vLLM and torchao"])
@pytest.mark.parametrize("lm", ["auto", "none"])
@pytest.mark.parametrize("card", [*CARDS, *TIERS], ids=lambda card: card.name)
def test_each_stage_runs_what_was_planned_for_it(card: Card, lm: str, installed: Installed) -> None:
    wishes = Wishes(lm="none" if lm == "none" else "auto", terms=Terms(installed=installed))
    deployment = deploy(card, wishes)
    assert sum(plan.budget_bytes for plan in deployment.plans) <= usable_bytes(card)
    for plan in deployment.plans:
        amount = plan.flags[plan.flags.index("--gpu-memory") + 1]
        budget_bytes = parse_memory(amount).of(card.memory_bytes)
        for flags in ((), plan.flags):
            arguments = ["--model", "a", *flags]
            assert STARTS[plan.service](plan, card, budget_bytes, installed, arguments) == outcome_of(plan)


@pytest.mark.parametrize("card", [*CARDS, *TIERS], ids=lambda card: card.name)
def test_budgets_of_ones_own_are_planned_as_the_stages_do(card: Card) -> None:
    shared = deploy(card, Wishes()).plans
    budgets: dict[Service, int] = {plan.service: plan.budget_bytes + (256 << 20) for plan in shared}
    if sum(budgets.values()) > usable_bytes(card):
        budgets = {"dit": int(0.9 * usable_bytes(card))}
    for plan in deploy(card, Wishes(), budgets).plans:
        found = STARTS[plan.service](plan, card, plan.budget_bytes, ALL, ["--model", "a"])
        assert found == outcome_of(plan)
