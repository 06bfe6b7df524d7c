"""One card for a planner, a diffusion model and a codec that are at hand: what each may take."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from soundstage_budget.cards import Card
from soundstage_budget.deployment import BudgetsDoNotAddUpError, usable_bytes
from soundstage_budget.engine_choice import choose_dtype
from soundstage_budget.models import DitModel, LmModel, VaeModel
from soundstage_budget.need import MIB, Offload, Quantization
from soundstage_budget.plan import OFFLOADS, Plan, plan_dit, plan_lm, plan_vae, size
from soundstage_budget.tiers import tier_of

_ENDLESS: Final = 1 << 60
_DURATIONS_S: Final = (600, 480, 360, 240, 120, 60, 30, 10)
_BATCHES: Final = (8, 4, 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The sizes of three models that are to share a card."""

    lm: LmModel
    dit: DitModel
    vae: VaeModel


def share(
    card: Card, models: Checkpoints, *, max_batch: int = _BATCHES[0], max_duration_s: int = _DURATIONS_S[0]
) -> tuple[Plan, ...]:
    """Plan all three, each with a budget of just what it needs; a card without capability is a CPU's memory.

    The longest songs come first, then networks that stay on the card, then the most songs at once. Raises
    BudgetsDoNotAddUpError with the least sum there is.
    """
    usable, least = usable_bytes(card), _ENDLESS
    terms = ""
    for plans in _options(card, models, max_batch, max_duration_s):
        total = sum(plan.budget_bytes for plan in plans)
        if total <= usable:
            return plans
        if total < least:
            least, terms = total, add_up(plans)
    raise BudgetsDoNotAddUpError(
        f"{card.name} has {size(usable)} of {size(card.memory_bytes)} to share, but the least that would do is {terms}"
    )


def add_up(plans: tuple[Plan, ...]) -> str:
    """Write the budgets of plans as a sum."""
    terms = " + ".join(f"{plan.service} {size(plan.budget_bytes)}" for plan in plans)
    return f"{terms} = {size(sum(plan.budget_bytes for plan in plans))}"


def flags_of(plans: tuple[Plan, ...]) -> dict[str, list[str]]:
    """Return what each stage is to be told of its plan, by its name."""
    return {
        plan.service: [
            "--gpu-memory",
            f"{-(-plan.budget_bytes // MIB)}MiB",
            *(["--quantization", plan.quantization] if plan.quantization != "none" else []),
        ]
        for plan in plans
    }


def _options(card: Card, models: Checkpoints, max_batch: int, max_duration_s: int) -> Iterator[tuple[Plan, ...]]:
    on_card, dtype = card.capability is not None, choose_dtype(card)
    quantization: Quantization = "int8" if on_card and tier_of(card.memory_gib).is_int8 else "none"
    offloads: tuple[Offload, ...] = OFFLOADS if on_card else ("none",)
    durations = [max_duration_s, *(step for step in _DURATIONS_S if step < max_duration_s)]
    batches = [max_batch, *(step for step in _BATCHES if step < max_batch)]
    for duration_s, offload, batch in product(durations, offloads, batches):
        plans = (
            plan_lm(
                [models.lm],
                budget_bytes=_ENDLESS,
                dtype=dtype,
                engine="torch",
                max_batch=batch,
                max_duration_s=duration_s,
                on_card=on_card,
            ),
            plan_dit(
                [models.dit],
                budget_bytes=_ENDLESS,
                dtype=dtype,
                quantizations=(quantization,),
                offloads=(offload,),
                max_batch=batch,
                max_duration_s=duration_s,
                on_card=on_card,
            ),
            plan_vae(
                models.vae,
                budget_bytes=_ENDLESS,
                max_batch=batch,
                offloads=("none",),
                on_card=on_card,
            ),
        )
        yield tuple(replace(plan, budget_bytes=plan.need.peak) for plan in plans)
