"""What cards of some sizes would run, by prediction: the arithmetic of `soundstage profile`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from soundstage_budget.cards import Card
from soundstage_budget.deployment import Deployment, Wishes, deploy
from soundstage_budget.plan import OFFLOADS, DoesNotFitError
from soundstage_budget.single_card import Terms

BATCHES: Final = (8, 4, 2, 1)
MODES: Final[Mapping[str, Wishes]] = {
    "default": Wishes(),
    "no-quant": Wishes(terms=Terms(quantization="none")),
    "no-offload": Wishes(terms=Terms(offload="none")),
}


def make_card(memory_gib: float) -> Card:
    """Make up a card of so much memory that can do whatever a card of today can."""
    return Card(name=f"a card of {memory_gib:g} GB", memory_gib=memory_gib, capability=(8, 0))


def forecast(memory_gib: float, wishes: Wishes) -> Deployment | str:
    """Plan a card, or say why nothing fits it."""
    try:
        return deploy(make_card(memory_gib), wishes)
    except DoesNotFitError as error:
        return str(error)


def find_boundaries(tiers: Sequence[float], *, with_lm: bool) -> dict[str, float | None]:
    """Find, for each mode, the smallest of the tiers that fits, with a planner or without."""
    return {
        mode: next((memory for memory in sorted(tiers) if _fits(memory, wishes, with_lm=with_lm)), None)
        for mode, wishes in MODES.items()
    }


def find_batch(memory_gib: float, *, with_lm: bool) -> int:
    """Find the largest of BATCHES that fits a card offloaded in any way, within its tier's limit; 0 where none does."""
    fitting = (
        batch
        for batch in BATCHES
        if any(
            _fits(memory_gib, Wishes(terms=Terms(max_batch=batch, offload=offload)), with_lm=with_lm, batch=batch)
            for offload in OFFLOADS
        )
    )
    return next(fitting, 0)


def _fits(memory_gib: float, wishes: Wishes, *, with_lm: bool, batch: int = 1) -> bool:
    found = forecast(memory_gib, replace(wishes, lm="auto" if with_lm else "none"))
    return (
        isinstance(found, Deployment)
        and with_lm == any(plan.service == "lm" for plan in found.plans)
        and all(plan.max_batch >= batch for plan in found.plans)
    )
