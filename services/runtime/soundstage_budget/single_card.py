"""One card for a planner, a diffusion model and a codec: what each may take."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from soundstage_budget.admit import BudgetsDoNotAddUpError, usable_bytes
from soundstage_budget.cards import Card
from soundstage_budget.engine_choice import AskedEngine, EngineChoice, choose_dtype, choose_engine
from soundstage_budget.installed import ALL, Installed
from soundstage_budget.models import DitModel, LmModel, VaeModel
from soundstage_budget.need import MIB, Offload
from soundstage_budget.plan import (
    DURATIONS_S,
    MOST_CALLS,
    MOST_SONGS,
    OFFLOADS,
    AskedOffload,
    AskedQuantization,
    Plan,
    plan_dit,
    plan_lm,
    plan_vae,
    size,
)
from soundstage_budget.tiers import tier_of

_ENDLESS: Final = 1 << 60
_LEAST_TILES: Final[dict[Offload, int]] = {"none": 64, "model": 32, "layer": 32}  # frames, where the card is shared


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The sizes of models that are to share a card; there may be no planner."""

    lm: LmModel | None
    dit: DitModel
    vae: VaeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is asked of all stages, and what they have to work with; "auto" and None are left open."""

    engine: AskedEngine = "auto"
    max_batch: int | None = None
    max_duration_s: int | None = None
    quantization: AskedQuantization = "auto"
    offload: AskedOffload = "auto"
    installed: Installed = ALL


OPEN: Final = Terms()


def share(
    card: Card, models: Checkpoints, terms: Terms = OPEN, *, shortest_s: int = DURATIONS_S[-1]
) -> tuple[Plan, ...]:
    """Plan all stages, each with a budget of what it needs; a card without capability is a CPU's memory.

    The longest songs come first, then networks that stay on the card, then the most songs at once. What each runs is
    what its process makes of its budget by itself. Raises BudgetsDoNotAddUpError with the least sum there is.
    """
    usable, least = usable_bytes(card), _ENDLESS
    sum_of_least = ""
    for plans in _options(card, models, terms, shortest_s):
        total = sum(plan.budget_bytes for plan in plans)
        if total <= usable:
            *others, codec = (plan_one(plan, card, models, terms) for plan in plans)
            return (*others, _widen(codec, usable - total, card, models, terms))
        if total < least:
            least, sum_of_least = total, add_up(plans)
    raise BudgetsDoNotAddUpError(
        f"{card.name} has {size(usable)} of {size(card.memory_bytes)} to share, but the least that would do is "
        f"{sum_of_least}"
    )


def plan_one(shared: Plan, card: Card, models: Checkpoints, terms: Terms) -> Plan:
    """Plan a stage anew within the budget that it was given, as its own process does."""
    match shared.service:
        case "lm":
            assert models.lm is not None
            return plan_planner([models.lm], shared.budget_bytes, card, terms)
        case "dit":
            return plan_diffusion([models.dit], shared.budget_bytes, card, terms)
        case "vae":
            return plan_codec(models.vae, shared.budget_bytes, card, terms)


def plan_planner(models: Sequence[LmModel], budget_bytes: int, card: Card, terms: Terms) -> Plan:
    """Plan one of several planners; raises DoesNotFitError."""
    choice = engine_on(card, terms)
    return plan_lm(
        models,
        card,
        budget_bytes=budget_bytes,
        dtype=choice.dtype,
        engine=choice.engine,
        max_batch=terms.max_batch,
        max_duration_s=terms.max_duration_s,
    )


def plan_diffusion(models: Sequence[DitModel], budget_bytes: int, card: Card, terms: Terms) -> Plan:
    """Plan one of several diffusion models; raises DoesNotFitError."""
    return plan_dit(
        models,
        card,
        budget_bytes=budget_bytes,
        dtype=choose_dtype(card),
        quantization=terms.quantization,
        offload=terms.offload,
        has_torchao=terms.installed.has_torchao,
        max_batch=terms.max_batch,
        max_duration_s=terms.max_duration_s,
    )


def plan_codec(model: VaeModel, budget_bytes: int, card: Card, terms: Terms) -> Plan:
    """Plan a codec; raises DoesNotFitError. On a card its calls wait on the host, so there may be many."""
    return plan_vae(
        model,
        card,
        budget_bytes=budget_bytes,
        offload="model" if terms.offload == "layer" else terms.offload,
        max_batch=MOST_CALLS if card.capability is not None else terms.max_batch or MOST_CALLS,
    )


def engine_on(card: Card, terms: Terms) -> EngineChoice:
    """Choose the planner's engine as if torch were built for the card."""
    kernels = "sm_{}{}".format(*card.capability) if card.capability else ""
    version = terms.installed.vllm_version
    return choose_engine(card, torch_arch_list=(kernels,), vllm_version=version, asked=terms.engine)


def add_up(plans: tuple[Plan, ...]) -> str:
    """Write the budgets of plans as a sum."""
    terms = " + ".join(f"{plan.service} {size(plan.budget_bytes)}" for plan in plans)
    return f"{terms} = {size(sum(plan.budget_bytes for plan in plans))}"


def flags_of(plans: tuple[Plan, ...]) -> dict[str, list[str]]:
    """Return what each stage is to be told of its plan, by its name."""
    return {plan.service: list(plan.flags) for plan in plans}


def _widen(codec: Plan, left_bytes: int, card: Card, models: Checkpoints, terms: Terms) -> Plan:
    """Give a codec half of what is left of a card: longer tiles, and more at once, cost less in all."""
    if card.capability is None:
        return codec
    wide = plan_codec(models.vae, codec.budget_bytes + left_bytes // 2, card, terms)
    return replace(wide, budget_bytes=-(-wide.need.peak // MIB) * MIB)


def _options(card: Card, models: Checkpoints, terms: Terms, shortest_s: int) -> Iterator[tuple[Plan, ...]]:
    """Plan all stages as if each had a card of its own, and give each what it needs, in whole MiB."""
    on_card = card.capability is not None
    offloads = OFFLOADS if terms.offload == "auto" and on_card else (terms.offload,)
    longest_s, most = terms.max_duration_s or DURATIONS_S[0], terms.max_batch or MOST_SONGS
    if on_card:
        limits = tier_of(card.memory_gib).limits(is_planned=models.lm is not None)
        longest_s, most = min(longest_s, limits.max_duration_s), min(most, limits.max_batch)
    # The longest first as it was asked for, for not all stages have the same limit.
    durations = [terms.max_duration_s, *(step for step in DURATIONS_S if shortest_s <= step < longest_s)]
    batches = [most]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    for duration_s, offload, batch in product(durations, offloads, batches):
        alone = replace(terms, max_duration_s=duration_s, max_batch=batch, offload=offload)
        frames = _LEAST_TILES["none" if offload == "auto" else offload]
        plans = (
            *([plan_planner([models.lm], _ENDLESS, card, alone)] if models.lm is not None else []),
            plan_diffusion([models.dit], _ENDLESS, card, alone),
            plan_vae(
                models.vae,
                card,
                budget_bytes=_ENDLESS,
                offload="model" if offload == "layer" else offload,
                window_frames=frames,
                max_tiles=1,
                max_batch=MOST_CALLS if on_card else batch,
            ),
        )
        yield tuple(replace(plan, budget_bytes=-(-plan.need.peak // MIB) * MIB) for plan in plans)
