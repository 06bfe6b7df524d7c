"""The released models on a card: which of them it runs, and what had to be given up."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from soundstage_budget.admit import BudgetsDoNotAddUpError, admit, usable_bytes
from soundstage_budget.cards import Card
from soundstage_budget.models import DITS, LMS, VAE
from soundstage_budget.plan import DoesNotFitError, Plan, Service, size
from soundstage_budget.single_card import (
    OPEN,
    Checkpoints,
    Terms,
    engine_on,
    plan_codec,
    plan_diffusion,
    plan_planner,
    share,
)
from soundstage_budget.tiers import LM_SIZES, LmSize, Tier, tier_of

# A planner is not worth songs of a minute.
_SHORTEST_S: Final = 240
_SHORTEST_ALONE_S: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is asked of a card; "auto" takes what its tier has."""

    lm: LmSize | Literal["auto", "none"] = "auto"
    dit: str = "turbo"
    terms: Terms = OPEN


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A card, its tier, and a plan for every service that fits on it."""

    card: Card
    tier: Tier
    usable_bytes: int
    plans: tuple[Plan, ...]
    given_up: tuple[str, ...]

    @property
    def used_bytes(self) -> int:
        """What all plans take together."""
        return sum(plan.need.peak for plan in self.plans)


def deploy(card: Card, wishes: Wishes, budgets: Mapping[Service, int] | None = None) -> Deployment:
    """Plan all services for a card: within `budgets`, or sharing it as they need.

    Raises BudgetsDoNotAddUpError for budgets that are more than the card, and DoesNotFitError where not even the least
    fits. All else that cannot be had is given up, in words.
    """
    if budgets:
        admit(card, budgets)
    chooser = _Chooser(card=card, wishes=wishes)
    plans = chooser.plan_within(budgets) if budgets else chooser.share()
    refused = chooser.refuse(plans, budgets)
    return Deployment(
        card=card,
        tier=chooser.tier,
        usable_bytes=usable_bytes(card),
        plans=plans,
        given_up=(*refused, *(f"{plan.service}: {words}" for plan in plans for words in plan.given_up)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chooser:
    """Plans for one card and one set of wishes."""

    card: Card
    wishes: Wishes

    @property
    def tier(self) -> Tier:
        return tier_of(self.card.memory_gib if self.on_card else 0)

    @property
    def on_card(self) -> bool:
        return self.card.capability is not None

    @property
    def wanted_lm(self) -> LmSize | None:
        """The planner that is wished for."""
        if self.wishes.lm == "none":
            return None
        return self.tier.default_lm if self.wishes.lm == "auto" else self.wishes.lm

    @property
    def lms(self) -> list[LmSize]:
        """The planners that are allowed, the best first."""
        wanted = self.wanted_lm
        if wanted is None:
            return []
        return [size for size in reversed(LM_SIZES[: LM_SIZES.index(wanted) + 1]) if size in self.tier.lm_sizes]

    @property
    def dits(self) -> list[str]:
        """The diffusion models that are allowed, the wished one first."""
        wanted = self.wishes.dit
        small = wanted.removeprefix("xl-")
        return list(dict.fromkeys([wanted, small])) if self.tier.has_xl else [small]

    def terms(self, *, is_planned: bool) -> Terms:
        """Return what is asked; a machine without a card has the limits of the lowest tier."""
        terms = self.wishes.terms
        if self.on_card:
            return terms
        limits = self.tier.limits(is_planned=is_planned)
        return replace(
            terms,
            max_duration_s=min(terms.max_duration_s or limits.max_duration_s, limits.max_duration_s),
            max_batch=min(terms.max_batch or limits.max_batch, limits.max_batch),
        )

    def share(self) -> tuple[Plan, ...]:
        """Share the card with the best models that it has room for."""
        for dit in self.dits:
            for lm in (*self.lms, None):
                models = Checkpoints(lm=LMS[lm] if lm else None, dit=DITS[dit], vae=VAE)
                shortest_s = _SHORTEST_S if lm else _SHORTEST_ALONE_S
                try:
                    return share(self.card, models, self.terms(is_planned=lm is not None), shortest_s=shortest_s)
                except BudgetsDoNotAddUpError:
                    continue
        raise DoesNotFitError(f"{self.card.name} has {size(usable_bytes(self.card))} to share, too little for any song")

    def plan_within(self, budgets: Mapping[Service, int]) -> tuple[Plan, ...]:
        """Plan each service that has a budget within it."""
        lms = self.lms if "lm" in budgets else []
        terms = self.terms(is_planned=bool(lms))
        plans: list[Plan] = []
        if lms:
            plans.append(plan_planner([LMS[lm] for lm in lms], budgets["lm"], self.card, terms))
        if "dit" in budgets:
            plans.append(plan_diffusion([DITS[dit] for dit in self.dits], budgets["dit"], self.card, terms))
        if "vae" in budgets:
            plans.append(plan_codec(VAE, budgets["vae"], self.card, terms))
        return tuple(plans)

    def refuse(self, plans: tuple[Plan, ...], budgets: Mapping[Service, int] | None) -> list[str]:
        """Say what was wished for and is not there."""
        by_service = {plan.service: plan for plan in plans}
        words = list(self._refuse_lm(by_service.get("lm"), budgets))
        dit = by_service.get("dit")
        if dit is not None and dit.variant != self.wishes.dit:
            words.append(
                f"diffusion model: {self.wishes.dit} asked, {dit.variant} fits a card of tier {self.tier.name}"
            )
        engine = engine_on(self.card, self.wishes.terms)
        if engine.is_fallback:
            words.append(f"engine: {self.wishes.terms.engine} asked, {engine.engine} is used: {engine.reason}")
        return words

    def _refuse_lm(self, plan: Plan | None, budgets: Mapping[Service, int] | None) -> tuple[str, ...]:
        wanted, given = self.wanted_lm, plan.variant if plan else "none"
        if budgets and "lm" in budgets and not self.lms:
            why = "none is asked for" if self.wishes.lm == "none" else f"a card of tier {self.tier.name} runs none"
            return (f"language model: it has a budget of {size(budgets['lm'])}, but {why}",)
        if budgets and "lm" not in budgets:
            return ("language model: it has no budget, so none is planned",) if wanted else ()
        if wanted is None:
            return () if self.wishes.lm == "none" else (f"language model: none is planned at tier {self.tier.name}",)
        if wanted != given:
            return (f"language model: {wanted} asked, {given} fits a card of tier {self.tier.name}",)
        return ()
