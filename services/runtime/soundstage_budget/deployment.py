"""All three services on one card: how its memory is shared, and whether budgets add up."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from soundstage_budget.cards import Card
from soundstage_budget.engine_choice import VLLM_VERSIONS, AskedEngine, EngineChoice, choose_dtype, choose_engine
from soundstage_budget.models import DITS, LMS, VAE
from soundstage_budget.need import Offload, Quantization
from soundstage_budget.plan import (
    OFFLOADS,
    DoesNotFitError,
    Plan,
    Service,
    instead,
    offloaded,
    plan_dit,
    plan_lm,
    plan_vae,
    size,
)
from soundstage_budget.tiers import LM_SIZES, LmSize, Tier, tier_of

_RESERVE: Final = 0.04  # of a card, for what it shows and what drivers round up


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What is asked of a card; "auto" and None take what its tier has."""

    lm: LmSize | Literal["auto", "none"] = "auto"
    dit: str = "turbo"
    engine: AskedEngine = "auto"
    max_batch: int | None = None
    max_duration_s: int | None = None
    quantization: Quantization | None = None
    offload: Offload | None = None


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


class BudgetsDoNotAddUpError(DoesNotFitError):
    """Budgets are more than the card has."""


def usable_bytes(card: Card) -> int:
    """Return what services may share of a card."""
    return int(card.memory_bytes * (1 - _RESERVE))


def admit(card: Card, budgets: Mapping[Service, int]) -> None:
    """Raise BudgetsDoNotAddUpError, with the sum, unless budgets fit on a card together."""
    total, usable = sum(budgets.values()), usable_bytes(card)
    if total > usable:
        terms = " + ".join(f"{name} {size(budget)}" for name, budget in budgets.items())
        raise BudgetsDoNotAddUpError(
            f"{terms} = {size(total)}, but {card.name} has {size(usable)} to share; "
            f"{size(total - usable)} less would do"
        )


def deploy(card: Card, wishes: Wishes, budgets: Mapping[Service, int] | None = None) -> Deployment:
    """Plan all services for a card: within `budgets`, or sharing it as they need.

    Raises BudgetsDoNotAddUpError for budgets that are more than the card, and DoesNotFitError where not even the least
    fits. All else that cannot be had is given up, in words.
    """
    if budgets:
        admit(card, budgets)
    chooser = _Chooser(card=card, wishes=wishes)
    plans = chooser.plan_within(budgets) if budgets else chooser.share()
    return Deployment(
        card=card,
        tier=chooser.tier,
        usable_bytes=usable_bytes(card),
        plans=plans,
        given_up=(*chooser.refuse(plans), *(f"{plan.service}: {words}" for plan in plans for words in plan.given_up)),
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
    def engine(self) -> EngineChoice:
        """Choose the planner's engine as if the builds for this card were installed."""
        kernels = "sm_{}{}".format(*self.card.capability) if self.card.capability else ""
        version = ".".join(map(str, VLLM_VERSIONS[0]))
        return choose_engine(self.card, torch_arch_list=(kernels,), vllm_version=version, asked=self.wishes.engine)

    @property
    def lms(self) -> list[LmSize]:
        """The planners that are allowed, the best first."""
        wanted = self.tier.default_lm if self.wishes.lm == "auto" else self.wishes.lm
        if wanted is None or wanted == "none":
            return []
        return [size for size in reversed(LM_SIZES[: LM_SIZES.index(wanted) + 1]) if size in self.tier.lm_sizes]

    @property
    def dits(self) -> list[str]:
        """The diffusion models that are allowed, the wished one first."""
        wanted = self.wishes.dit
        small = wanted.removeprefix("xl-")
        return list(dict.fromkeys([wanted, small])) if self.tier.has_xl else [small]

    @property
    def quantizations(self) -> tuple[Quantization, ...]:
        if self.wishes.quantization is not None:
            return (self.wishes.quantization,)
        return ("int8",) if self.tier.is_int8 and self.on_card else ("none", "int8")

    def limit(self, lm: LmSize | None) -> tuple[int, int]:
        """Return the longest song in seconds and the most at once, by tier and wish."""
        limits = self.tier.limits(lm)
        return (
            min(limits.max_duration_s, self.wishes.max_duration_s or limits.max_duration_s),
            min(limits.max_batch, self.wishes.max_batch or limits.max_batch),
        )

    def share(self) -> tuple[Plan, ...]:
        """Share the card: the best planner, then the longest songs, then all on the card, then the most at once."""
        usable = usable_bytes(self.card)
        for dit in self.dits:
            for lm in (*self.lms, None):
                longest_s, most = self.limit(lm)
                # A planner is not worth songs of a minute.
                shorter = (360, 240) if lm else (360, 240, 120, 60)
                for duration_s in (longest_s, *(step for step in shorter if step < longest_s)):
                    for offload in OFFLOADS if self.wishes.offload is None else (self.wishes.offload,):
                        batch = most
                        while batch:
                            plans = self._alone(lm, dit, duration_s, offload, batch)
                            if sum(plan.need.peak for plan in plans) <= usable:
                                return tuple(replace(plan, given_up=self._tell(plan, lm)) for plan in plans)
                            batch //= 2
        raise DoesNotFitError(f"{self.card.name} has {size(usable)} to share, too little for any song")

    def _tell(self, plan: Plan, lm: LmSize | None) -> tuple[str, ...]:
        """Say what sharing the card cost a service."""
        limits = self.tier.limits(lm)
        return (
            *instead(
                "longest song in seconds", self.wishes.max_duration_s or limits.max_duration_s, plan.max_duration_s
            ),
            *instead("songs at once", self.wishes.max_batch or limits.max_batch, plan.max_batch),
            *(("precision: weights of one byte",) if plan.quantization == "int8" else ()),
            *offloaded("none", plan.offload),
        )

    def _alone(self, lm: LmSize | None, dit: str, duration_s: int, offload: Offload, batch: int) -> tuple[Plan, ...]:
        """Plan services as if each had a card of its own, and give each what it needs."""
        endless = 1 << 60
        dtype = choose_dtype(self.card)
        plans = [
            plan_dit(
                [DITS[dit]],
                budget_bytes=endless,
                dtype=dtype,
                quantizations=self.quantizations,
                offloads=(offload,),
                max_batch=batch,
                max_duration_s=duration_s,
                on_card=self.on_card,
            ),
            plan_vae(
                VAE,
                budget_bytes=endless,
                window_frames=64 if offload == "none" else 32,
                max_batch=batch,
                max_duration_s=duration_s,
                offloads=("none" if offload == "none" else "model",),
                on_card=self.on_card,
            ),
        ]
        if lm is not None:
            plans.insert(0, self._plan_lm([lm], endless, duration_s, batch))
        return tuple(replace(plan, budget_bytes=plan.need.peak) for plan in plans)

    def _plan_lm(self, lms: list[LmSize], budget_bytes: int, duration_s: int, batch: int) -> Plan:
        return plan_lm(
            [LMS[lm] for lm in lms],
            budget_bytes=budget_bytes,
            dtype=self.engine.dtype,
            engine=self.engine.engine,
            max_batch=batch,
            max_duration_s=duration_s,
            on_card=self.on_card,
        )

    def plan_within(self, budgets: Mapping[Service, int]) -> tuple[Plan, ...]:
        """Plan each service that has a budget within it."""
        lms = self.lms if "lm" in budgets else []
        duration_s, batch = self.limit(lms[0] if lms else None)
        plans: list[Plan] = []
        if lms:
            plans.append(self._plan_lm(lms, budgets["lm"], duration_s, batch))
        if "dit" in budgets:
            plans.append(
                plan_dit(
                    [DITS[dit] for dit in self.dits],
                    budget_bytes=budgets["dit"],
                    dtype=choose_dtype(self.card),
                    quantizations=self.quantizations,
                    max_batch=batch,
                    max_duration_s=duration_s,
                    on_card=self.on_card,
                )
            )
        if "vae" in budgets:
            plans.append(
                plan_vae(
                    VAE,
                    budget_bytes=budgets["vae"],
                    max_batch=batch,
                    max_duration_s=duration_s,
                    on_card=self.on_card,
                )
            )
        return tuple(plans)

    def refuse(self, plans: tuple[Plan, ...]) -> list[str]:
        """Say what was wished for and is not there."""
        by_service = {plan.service: plan for plan in plans}
        wanted = self.tier.default_lm if self.wishes.lm == "auto" else self.wishes.lm
        given = by_service["lm"].variant if "lm" in by_service else "none"
        words: list[str] = []
        if wanted is None:
            words.append(f"language model: none is planned at tier {self.tier.name}")
        elif wanted != given:
            words.append(f"language model: {wanted} asked, {given} fits a card of tier {self.tier.name}")
        dit = by_service.get("dit")
        if dit is not None and dit.variant != self.wishes.dit:
            words.append(
                f"diffusion model: {self.wishes.dit} asked, {dit.variant} fits a card of tier {self.tier.name}"
            )
        if self.engine.is_fallback:
            words.append(f"engine: {self.wishes.engine} asked, {self.engine.engine} is used: {self.engine.reason}")
        return words
