"""A service within its budget: the nearest to what was asked that fits, and in words what was given up for it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

from soundstage_budget.cards import GIB
from soundstage_budget.models import DitModel, LmModel, VaeModel
from soundstage_budget.need import Need, Offload, Quantization, need_dit, need_lm, need_vae
from soundstage_runtime.errors import StartError

Service = Literal["lm", "dit", "vae"]
OFFLOADS: Final[tuple[Offload, ...]] = ("none", "model", "layer")
_DURATIONS_S: Final = (600, 480, 360, 240, 120, 60, 30, 10)
_WINDOWS: Final = (2048, 1536, 1024, 512, 256, 128, 64, 48, 32)
_TOKENS: Final = (7_500, 3_750, 1_875, 750, 375)


class DoesNotFitError(StartError):
    """Nothing that was allowed fits the budget; the message has the figures, and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a service runs. What does not apply to it is "" or 0."""

    service: Service
    variant: str
    dtype: str
    engine: str = ""
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


def size(size_bytes: float) -> str:
    """Write bytes for people."""
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= 0.1 * GIB else f"{size_bytes / (1 << 20):.1f} MiB"


def plan_vae(
    model: VaeModel,
    *,
    budget_bytes: int,
    dtype: str = "float32",
    window_frames: int = 64,
    max_tiles: int = 1,
    max_batch: int = 8,
    max_duration_s: int = 600,
    offloads: Sequence[Offload] = OFFLOADS,
    on_card: bool,
) -> Plan:
    """Plan a codec; raises DoesNotFitError."""
    options = product(offloads, _down(window_frames, _WINDOWS), _halves(max_batch), _halves(max_tiles))

    def plan(option: tuple[Offload, int, int, int]) -> Plan:
        offload, window, batch, tiles = option
        need = need_vae(
            model,
            dtype=dtype,
            window_frames=window,
            max_tiles=tiles,
            max_batch=batch,
            max_duration_s=max_duration_s,
            offload=offload,
            on_card=on_card,
        )
        return Plan(
            service="vae",
            variant=model.variant,
            dtype=dtype,
            offload=offload,
            max_duration_s=max_duration_s,
            max_batch=batch,
            window_frames=window,
            max_tiles=tiles,
            budget_bytes=budget_bytes,
            need=need,
            given_up=(
                *instead("window_frames", window_frames, window),
                *instead("calls at once", max_batch, batch),
                *instead("tiles at once", max_tiles, tiles),
                *offloaded(offloads[0], offload),
            ),
        )

    return _first("vae", map(plan, options), budget_bytes)


def plan_lm(
    models: Sequence[LmModel],
    *,
    budget_bytes: int,
    dtype: str,
    engine: str,
    max_batch: int = 8,
    max_duration_s: int = 600,
    on_card: bool,
) -> Plan:
    """Plan one of several planners, the first that fits; raises DoesNotFitError."""
    options = product(models, _down(max_duration_s, _DURATIONS_S), _halves(max_batch))

    def plan(option: tuple[LmModel, int, int]) -> Plan:
        model, duration_s, batch = option
        need = need_lm(
            model,
            dtype=dtype,
            max_batch=batch,
            max_duration_s=duration_s,
            on_card=on_card,
            judges=engine == "torch",
        )
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
                *instead("language model", models[0].variant, model.variant),
                *instead("longest song in seconds", max_duration_s, duration_s),
                *instead("songs at once", max_batch, batch),
            ),
        )

    return _first("lm", map(plan, options), budget_bytes)


def plan_dit(
    models: Sequence[DitModel],
    *,
    budget_bytes: int,
    dtype: str,
    quantizations: Sequence[Quantization] = ("none", "int8"),
    offloads: Sequence[Offload] = OFFLOADS,
    max_batch: int = 8,
    max_duration_s: int = 600,
    max_tokens: int = _TOKENS[0],
    on_card: bool,
) -> Plan:
    """Plan one of several diffusion models, the first that fits; raises DoesNotFitError."""
    options = product(
        models,
        _down(max_duration_s, _DURATIONS_S),
        quantizations,
        offloads,
        _down(max_tokens, _TOKENS),
        _halves(max_batch),
    )

    def plan(option: tuple[DitModel, int, Quantization, Offload, int, int]) -> Plan:
        model, duration_s, quantization, offload, tokens, batch = option
        need = need_dit(
            model,
            dtype=dtype,
            quantization=quantization,
            offload=offload,
            max_batch=batch,
            max_duration_s=duration_s,
            max_tokens=tokens,
            on_card=on_card,
        )
        return Plan(
            service="dit",
            variant=model.variant,
            dtype=dtype,
            quantization=quantization,
            offload=offload,
            max_duration_s=duration_s,
            max_batch=batch,
            max_tokens=tokens,
            budget_bytes=budget_bytes,
            need=need,
            given_up=(
                *instead("diffusion model", models[0].variant, model.variant),
                *instead("longest song in seconds", max_duration_s, duration_s),
                *instead("quantization", quantizations[0], quantization),
                *offloaded(offloads[0], offload),
                *instead("tokens in a step", max_tokens, tokens),
                *instead("songs at once", max_batch, batch),
            ),
        )

    return _first("dit", map(plan, options), budget_bytes)


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


def instead(what: str, asked: str | int, given: str | int) -> tuple[str, ...]:
    """Say what was given instead of what was asked, if it was."""
    return () if asked == given else (f"{what}: {asked} asked, {given} fits",)


def offloaded(asked: Offload, given: Offload) -> tuple[str, ...]:
    """Say what offloading costs, if it was not asked for."""
    words = {"model": "networks leave the card when they are idle", "layer": "layers come to the card one by one"}
    return () if asked == given else (f"speed: {words[given]}",)
