"""A service within its budget: the nearest to what was asked that fits, and in words what was given up for it.

Whoever plans, a stage for itself or a tool for all, plans here: the same card, budget and wishes give the same plan.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

from soundstage_budget.cards import GIB, Card
from soundstage_budget.engine_choice import EngineName
from soundstage_budget.models import DitModel, LmModel, VaeModel
from soundstage_budget.need import MIB, Need, Offload, Quantization, need_dit, need_lm, need_vae
from soundstage_budget.tiers import Limits, tier_of
from soundstage_runtime.errors import StartError
from soundstage_runtime.score import DURATION_RANGE_S

Service = Literal["lm", "dit", "vae"]
AskedOffload = Offload | Literal["auto"]
AskedQuantization = Quantization | Literal["auto"]
OFFLOADS: Final[tuple[Offload, ...]] = ("none", "model", "layer")
DURATIONS_S: Final = (600, 480, 360, 240, 120, 60, 30, 10)
MOST_SONGS: Final = 8  # at once, where nothing else is asked for
MOST_CALLS: Final = 64  # of a codec
_LONGEST_S: Final = int(DURATION_RANGE_S[1])
_WINDOWS: Final = (2048, 1536, 1024, 512, 256, 128, 64, 48, 32)
_CARD_TILE: Final = (1536, 4)  # frames and tiles, the most that is chosen unasked
_CPU_TILE: Final = (64, 1)
_TOKENS: Final = (7_500, 3_750, 1_875, 750, 375)


class DoesNotFitError(StartError):
    """Nothing that was allowed fits the budget; the message has the figures, and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a service runs. What does not apply to it is "" or 0."""

    service: Service
    variant: str
    dtype: str
    engine: EngineName | Literal[""] = ""
    quantization: Quantization = "none"
    offload: Offload = "none"
    max_duration_s: int
    max_batch: int
    max_tokens: int = 0
    window_frames: int = 0
    max_tiles: int = 0
    budget_bytes: int
    need: Need
    given_up: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """What its process is told to run just that."""
        told = {"--gpu-memory": f"{-(-self.budget_bytes // MIB)}MiB", "--max-in-flight": str(self.max_batch)}
        match self.service:
            case "lm":
                told |= {"--engine": self.engine, "--max-duration-s": str(self.max_duration_s)}
            case "dit":
                told |= {"--quantization": self.quantization, "--offload": self.offload}
                told |= {"--max-duration-s": str(self.max_duration_s)}
            case "vae":
                told |= {"--offload": self.offload}
        return tuple(part for flag in told.items() for part in flag)


def size(size_bytes: float) -> str:
    """Write bytes for people."""
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= 0.1 * GIB else f"{size_bytes / (1 << 20):.1f} MiB"


def plan_vae(
    model: VaeModel,
    card: Card,
    *,
    budget_bytes: int,
    dtype: str = "float32",
    offload: AskedOffload = "auto",
    window_frames: int | Literal["auto"] = "auto",
    max_tiles: int | Literal["auto"] = "auto",
    max_batch: int = MOST_CALLS,
) -> Plan:
    """Plan a codec; raises DoesNotFitError."""
    on_card = card.capability is not None
    offloads = _offloads(offload, ("none", "model"), on_card=on_card)
    frames, tiles = _CARD_TILE if on_card else _CPU_TILE
    longest = frames if window_frames == "auto" else window_frames
    most = tiles if max_tiles == "auto" else max_tiles
    options = product(offloads, _down(longest, _WINDOWS), _halves(max_batch), _halves(most))

    def plan(option: tuple[Offload, int, int, int]) -> Plan:
        offload, window, batch, tiles = option
        need = need_vae(
            model,
            dtype=dtype,
            window_frames=window,
            max_tiles=tiles,
            max_batch=batch,
            max_duration_s=_LONGEST_S,
            offload=offload,
            on_card=on_card,
        )
        return Plan(
            service="vae",
            variant=model.variant,
            dtype=dtype,
            offload=offload,
            max_duration_s=_LONGEST_S,
            max_batch=batch,
            window_frames=window,
            max_tiles=tiles,
            budget_bytes=budget_bytes,
            need=need,
            given_up=(
                *(() if window_frames == "auto" else _instead("window_frames", window_frames, window)),
                *_instead("calls at once", max_batch, batch),
                *(() if max_tiles == "auto" else _instead("tiles at once", max_tiles, tiles)),
                *_offloaded(offloads[0], offload),
            ),
        )

    return _first("vae", map(plan, options), budget_bytes)


def plan_lm(
    models: Sequence[LmModel],
    card: Card,
    *,
    budget_bytes: int,
    dtype: str,
    engine: EngineName,
    max_batch: int | None = None,
    max_duration_s: int | None = None,
) -> Plan:
    """Plan one of several planners, the first that fits; raises DoesNotFitError."""
    on_card = card.capability is not None
    limits = tier_of(card.memory_gib).with_lm if on_card else None
    longest_s, most = _limit(limits, max_duration_s, max_batch)
    options = product(models, _down(longest_s, DURATIONS_S), _halves(most))

    def plan(option: tuple[LmModel, int, int]) -> Plan:
        model, duration_s, batch = option
        need = need_lm(model, dtype=dtype, max_batch=batch, max_duration_s=duration_s, on_card=on_card, engine=engine)
        return Plan(
            service="lm",
            variant=model.variant,
            dtype=dtype,
            engine=engine,
            max_duration_s=duration_s,
            max_batch=batch,
            budget_bytes=budget_bytes,
            need=need,
            given_up=(
                *_instead("language model", models[0].variant, model.variant),
                *_instead("longest song in seconds", max_duration_s or longest_s, duration_s),
                *_instead("songs at once", max_batch or most, batch),
            ),
        )

    return _first("lm", map(plan, options), budget_bytes)


def plan_dit(
    models: Sequence[DitModel],
    card: Card,
    *,
    budget_bytes: int,
    dtype: str,
    quantization: AskedQuantization = "auto",
    offload: AskedOffload = "auto",
    has_torchao: bool = True,
    max_batch: int | None = None,
    max_duration_s: int | None = None,
    max_tokens: int = _TOKENS[0],
) -> Plan:
    """Plan one of several diffusion models, the first that fits; raises DoesNotFitError.

    It does not know of a planner beside it: a song that brings its codes may be as long as songs are without one.
    """
    on_card = card.capability is not None
    limits = tier_of(card.memory_gib).without_lm if on_card else None
    longest_s, most = _limit(limits, max_duration_s, max_batch)
    quantizations = _quantizations(quantization, card, has_torchao=has_torchao)
    offloads = _offloads(offload, OFFLOADS, on_card=on_card)
    options = product(
        models,
        _down(longest_s, DURATIONS_S),
        quantizations,
        offloads,
        _down(max_tokens, _TOKENS),
        _halves(most),
    )

    def plan(option: tuple[DitModel, int, Quantization, Offload, int, int]) -> Plan:
        model, duration_s, rounded, away, tokens, batch = option
        need = need_dit(
            model,
            dtype=dtype,
            quantization=rounded,
            offload=away,
            max_batch=batch,
            max_duration_s=duration_s,
            max_tokens=tokens,
            on_card=on_card,
        )
        return Plan(
            service="dit",
            variant=model.variant,
            dtype=dtype,
            quantization=rounded,
            offload=away,
            max_duration_s=duration_s,
            max_batch=batch,
            max_tokens=tokens,
            budget_bytes=budget_bytes,
            need=need,
            given_up=(
                *_instead("diffusion model", models[0].variant, model.variant),
                *_instead("longest song in seconds", max_duration_s or longest_s, duration_s),
                *(("precision: weights of one byte",) if quantization == "auto" and rounded != "none" else ()),
                *_offloaded(offloads[0], away),
                *_instead("tokens in a step", max_tokens, tokens),
                *_instead("songs at once", max_batch or most, batch),
            ),
        )

    return _first("dit", map(plan, options), budget_bytes)


def _limit(limits: Limits | None, max_duration_s: int | None, max_batch: int | None) -> tuple[int, int]:
    """Return the longest song in seconds and the most at once: what is asked, within the limits of a card's tier."""
    most = limits or Limits(max_duration_s=_LONGEST_S, max_batch=MOST_SONGS)
    if limits is None:
        return max_duration_s or most.max_duration_s, max_batch or most.max_batch
    return min(max_duration_s or _LONGEST_S, most.max_duration_s), min(max_batch or MOST_SONGS, most.max_batch)


def _quantizations(asked: AskedQuantization, card: Card, *, has_torchao: bool) -> tuple[Quantization, ...]:
    """Return how weights may be rounded: unasked by torchao alone, first on cards whose tier has it so."""
    if asked != "auto":
        return (asked,)
    if card.capability is None or not has_torchao:
        return ("none",)
    return ("int8", "none") if tier_of(card.memory_gib).is_int8 else ("none", "int8")


def _offloads(asked: AskedOffload, known: tuple[Offload, ...], *, on_card: bool) -> tuple[Offload, ...]:
    if not on_card:
        return ("none",)
    return known if asked == "auto" else (asked,)


def _first(service: Service, plans: Iterable[Plan], budget_bytes: int) -> Plan:
    """Return the first plan that fits; raises DoesNotFitError with the figures of the smallest."""
    smallest: Plan | None = None
    for plan in plans:
        if plan.need.peak <= budget_bytes:
            return plan
        if smallest is None or plan.need.peak < smallest.need.peak:
            smallest = plan
    assert smallest is not None
    need = smallest.need
    parts = ", ".join(
        f"{name} {size(part)}"
        for name, part in (
            ("weights", need.weights),
            ("keys and values", need.kv),
            ("activations", need.activations),
            ("workspace", need.workspace),
            ("context", need.context),
            ("loading at its peak", need.loading if need.peak > need.total else 0),
        )
        if part
    )
    raise DoesNotFitError(
        f"gpu_memory gives {service} {size(budget_bytes)}; {smallest.variant} in {smallest.dtype} needs at least "
        f"{size(need.peak)} ({parts}): give it that much"
    )


def _down(asked: int, ladder: Sequence[int]) -> Iterator[int]:
    yield asked
    yield from (step for step in ladder if step < asked)


def _halves(asked: int) -> Iterator[int]:
    while asked >= 1:
        yield asked
        asked //= 2


def _instead(what: str, asked: str | int, given: str | int) -> tuple[str, ...]:
    """Say what was given instead of what was asked, if it was."""
    return () if asked == given else (f"{what}: {asked} asked, {given} fits",)


def _offloaded(asked: Offload, given: Offload) -> tuple[str, ...]:
    """Say what offloading costs, if it was not asked for."""
    words = {"model": "networks leave the card when they are idle", "layer": "layers come to the card one by one"}
    return () if asked == given else (f"speed: {words[given]}",)
