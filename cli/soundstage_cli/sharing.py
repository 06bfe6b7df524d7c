"""`soundstage up`: one card's memory, shared among the stages or given to each, and whether it adds up."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final, get_args

import typer
from rich.console import Console

from soundstage_budget.admit import admit
from soundstage_budget.cards import GIB, Card
from soundstage_budget.engine_choice import AskedEngine
from soundstage_budget.installed import find_installed
from soundstage_budget.plan import AskedOffload, AskedQuantization, Service, size
from soundstage_budget.single_card import Terms, add_up, flags_of, share
from soundstage_cli.checkpoint_sizes import read_sizes
from soundstage_cli.doctor import Found, find_own
from soundstage_cli.models import Models
from soundstage_runtime.memory import parse_memory

Flags = Mapping[str, Sequence[str]]
GpuMemory = Annotated[
    str | None, typer.Option(help="memory of one card for all stages, as 8GiB or 0.5; without a card, of the machine")
]
_SERVICES: Final = get_args(Service)
_FIRST_CARD: Final = ("auto", "cuda", "cuda:0")


def share_memory(console: Console, gpu_memory: str, models: Models, environment: Mapping[str, str]) -> Flags:
    """Show how stages share a card's memory; gives the flags that tell them so, but for what their variables say.

    Raises ModelsError, and BudgetsDoNotAddUpError with the least that would do.
    """
    if "," in models.dit:
        message = "shares a card with one diffusion model; for several, give each stage a --gpu-memory of its own"
        raise typer.BadParameter(message, param_hint="--gpu-memory")
    found = find_own()
    try:
        memory_bytes = parse_memory(gpu_memory).of(found.card.memory_bytes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu-memory") from error
    card = leave_to_others(console, found, memory_bytes)
    plans = share(card, read_sizes(models), read_terms(environment))
    console.print(f"memory: {add_up(plans)}", highlight=False)
    return {service: leave_out(service, flags, environment) for service, flags in flags_of(plans).items()}


def leave_to_others(console: Console, found: Found, memory_bytes: int) -> Card:
    """Return a card of so much memory, or of what other processes have left, and say what they have."""
    if found.card.capability is not None and memory_bytes > found.free_bytes:
        taken, total = found.card.memory_bytes - found.free_bytes, found.card.memory_bytes
        console.print(
            f"memory: {size(memory_bytes)} asked + {size(taken)} that other processes have = "
            f"{size(memory_bytes + taken)}, but {found.card.name} has {size(total)}; what is left is shared",
            highlight=False,
        )
        memory_bytes = found.free_bytes
    return replace(found.card, memory_gib=memory_bytes / GIB)


def read_terms(environment: Mapping[str, str]) -> Terms:
    """Return what the variables of the stages ask for; what is none of the known is left for the stage to refuse."""
    asked: dict[str, Any] = {
        name: environment[variable]
        for name, variable, known in (
            ("engine", "SOUNDSTAGE_LM_ENGINE", get_args(AskedEngine)),
            ("quantization", "SOUNDSTAGE_DIT_QUANTIZATION", _names(AskedQuantization)),
            ("offload", "SOUNDSTAGE_DIT_OFFLOAD", _names(AskedOffload)),
        )
        if environment.get(variable) in known
    }
    return Terms(installed=find_installed(), **asked)


def leave_out(service: str, flags: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return a stage's flags but for those that it has a variable for; the budget stays."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [
        part
        for flag, value in pairs
        if flag == "--gpu-memory" or variable_of(service, flag.removeprefix("--")) not in environment
        for part in (flag, value)
    ]


def check_budgets(environment: Mapping[str, str], card: Card | None = None) -> None:
    """Refuse budgets that stages have by their variables, and that are more than the card they are on: this machine's.

    Raises BudgetsDoNotAddUpError with the sum.
    """
    given = {name: amount for name in _SERVICES if (amount := environment.get(variable_of(name, "gpu-memory")))}
    if not given:
        return
    card = card or find_own().card
    by_device: dict[str, dict[Service, int]] = {}
    for name, amount in given.items():
        device = environment.get(variable_of(name, "device"), "auto")
        try:
            budget_bytes = parse_memory(amount).of(card.memory_bytes)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint=variable_of(name, "gpu-memory")) from error
        if device != "cpu" or card.capability is None:
            by_device.setdefault("auto" if device in _FIRST_CARD else device, {})[name] = budget_bytes
    for budgets in by_device.values():
        admit(card, budgets)


def variable_of(service: str, flag: str) -> str:
    """Return what a stage's flag is called in the environment."""
    return f"SOUNDSTAGE_{service}_{flag}".replace("-", "_").upper()


def _names(asked: Any) -> tuple[str, ...]:
    """Return all that a union of literals allows."""
    return tuple(name for part in get_args(asked) for name in (get_args(part) or (part,)))
