"""`soundstage up --gpu-memory`: one card's memory, shared among the stages."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from soundstage_budget.cards import GIB
from soundstage_budget.single_card import add_up, flags_of, share
from soundstage_cli.checkpoint_sizes import read_sizes
from soundstage_cli.doctor import find_own_card
from soundstage_cli.models import Models
from soundstage_runtime.memory import parse_memory

Flags = Mapping[str, Sequence[str]]
GpuMemory = Annotated[
    str | None, typer.Option(help="memory of one card for all stages, as 8GiB or 0.5; without a card, of the machine")
]


def share_memory(console: Console, gpu_memory: str, models: Models) -> Flags:
    """Show how stages share a card's memory; gives the flags that tell them so.

    Raises ModelsError, and BudgetsDoNotAddUpError with the least that would do.
    """
    if "," in models.dit:
        message = "shares a card with one diffusion model; for several, give each stage a --gpu-memory of its own"
        raise typer.BadParameter(message, param_hint="--gpu-memory")
    card = find_own_card()
    try:
        memory_bytes = parse_memory(gpu_memory).of(card.memory_bytes)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu-memory") from error
    plans = share(replace(card, memory_gib=memory_bytes / GIB), read_sizes(models))
    console.print(f"memory: {add_up(plans)}", highlight=False)
    return flags_of(plans)
