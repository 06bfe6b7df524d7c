"""What a larger card would buy, by its own plan."""

from dataclasses import replace
from typing import Final

from soundstage_budget.cards import Card
from soundstage_budget.deployment import Deployment, Wishes, deploy
from soundstage_budget.installed import ALL
from soundstage_budget.plan import DoesNotFitError, Plan

_SOLD_GIB: Final = (4, 6, 8, 12, 16, 20, 24, 32, 48)
_KEPT_GIB: Final = 0.4  # of what a card is sold with: most report that much less
_LEAST_REPORTED: Final = 0.91  # of what a card is sold with, where error correction takes its part


def describe_next(now: Deployment, wishes: Wishes) -> str:
    """Say what the smallest larger card of today that has more would have; "" where none has more."""
    own_gib = 0.0 if now.card.capability is None else now.card.memory_gib / _LEAST_REPORTED
    for sold_gib in _SOLD_GIB:
        if sold_gib <= own_gib:
            continue
        try:
            as_installed = replace(wishes, terms=replace(wishes.terms, installed=ALL))
            then = deploy(Card(memory_gib=sold_gib - _KEPT_GIB, capability=(8, 0)), as_installed)
        except DoesNotFitError:
            continue
        if gains := _list_gains(now, then):
            return f"a card of {sold_gib} GB would have {', '.join(gains)}"
    return ""


def _list_gains(now: Deployment, then: Deployment) -> list[str]:
    (old_lm, old_engine, old), (new_lm, new_engine, new) = _read(now), _read(then)
    old_s, new_s = (min(plan.max_duration_s for plan in found.plans) for found in (now, then))
    gains = {
        f"the {new_lm} language model": new_lm not in ("", old_lm),
        "vLLM": new_engine == "vllm" != old_engine,
        "the XL models": then.tier.has_xl and not now.tier.has_xl,
        f"{new.max_batch} songs at once": new.max_batch > old.max_batch,
        f"songs of {new_s / 60:g} minutes": new_s > old_s,
        "weights in full": old.quantization == "int8" and new.quantization == "none",
        "all networks on the card": old.offload != "none" and new.offload == "none",
    }
    return [words for words, is_gain in gains.items() if is_gain]


def _read(deployment: Deployment) -> tuple[str, str, Plan]:
    """Return the planner and its engine, "" where there is none, and the diffusion's plan."""
    by_service = {plan.service: plan for plan in deployment.plans}
    lm = by_service.get("lm")
    return (lm.variant, lm.engine, by_service["dit"]) if lm else ("", "", by_service["dit"])
