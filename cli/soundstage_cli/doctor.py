"""`soundstage doctor`: what a card can run, how its memory is shared, and what had to be given up."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from soundstage_budget.cards import GIB, Card, UnknownCardError, find_card
from soundstage_budget.deployment import Deployment, Wishes, deploy
from soundstage_budget.engine_choice import AskedEngine
from soundstage_budget.installed import ALL, find_installed
from soundstage_budget.larger_card import describe_next
from soundstage_budget.models import DITS
from soundstage_budget.need import MIB
from soundstage_budget.plan import DoesNotFitError, Plan, Service, size
from soundstage_budget.single_card import Terms
from soundstage_budget.tiers import LM_SIZES
from soundstage_cli.output import keep_writable
from soundstage_runtime.memory import parse_memory, parse_vram

app = typer.Typer()
_BAR_CELLS: Final = 60
_PARTS: Final = {  # of a need, by how a bar shows them
    "weights": ("█", "blue"),
    "kv": ("▓", "magenta"),
    "activations": ("▒", "green"),
    "workspace": ("░", "yellow"),
    "context": ("▚", "red"),
}
_PROBE_TIMEOUT_S: Final = 60
_SMI: Final = ("nvidia-smi", "--query-gpu=name,memory.total,memory.free,compute_cap", "--format=csv,noheader,nounits")
_TORCH_PROBE: Final = """
import torch
if torch.cuda.is_available():
    p, free = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info(0)[0]
    is_rocm = int(torch.version.hip is not None)
    print(p.name, p.total_memory / 2**20, free / 2**20, f"{p.major}.{p.minor}", is_rocm, sep=",")
"""


@app.command()
def doctor(
    card: Annotated[
        str | None, typer.Option(help='a card to simulate, as "RTX 3060 12GB"; else this machine\'s')
    ] = None,
    gpu_memory: Annotated[
        list[str] | None, typer.Option(help="a service's budget, as lm=3GiB or vae=0.1; one a service")
    ] = None,
    lm: Annotated[str, typer.Option(help="auto, none, 0.6B, 1.7B or 4B")] = "auto",
    dit: Annotated[str, typer.Option(help=", ".join(DITS))] = "turbo",
    engine: Annotated[str, typer.Option(help="auto, torch or vllm")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    plot: Annotated[
        Path | None, typer.Option(callback=keep_writable, help="a PNG to draw the memory into; needs matplotlib")
    ] = None,
) -> None:
    """Say what a card can run; MAX_CUDA_VRAM=8 makes it one of 8 GB."""
    for hint, value, known in (
        ("--lm", lm, ("auto", "none", *LM_SIZES)),
        ("--dit", dit, tuple(DITS)),
        ("--engine", engine, get_args(AskedEngine)),
    ):
        if value not in known:
            raise typer.BadParameter(f"is {value!r}; must be one of {', '.join(known)}", param_hint=hint)
    found = find_own_card() if card is None else shrink(find_named(card), os.environ.get("MAX_CUDA_VRAM", ""))
    budgets = read_budgets(gpu_memory or [], found.memory_bytes)
    asked: Any = {"lm": lm, "dit": dit}
    asked_engine: Any = engine
    # Of another card nothing is known but that it can be had with all that it could use.
    terms = Terms(engine=asked_engine, installed=find_installed() if card is None else ALL)
    wishes = Wishes(**asked, terms=terms)
    try:
        deployment = deploy(found, wishes, budgets)
    except DoesNotFitError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    if plot is not None:
        draw(deployment, plot)
    next_card = "" if budgets else describe_next(deployment, wishes)
    if as_json:
        flags = {plan.service: " ".join(plan.flags) for plan in deployment.plans}
        print(json.dumps({**asdict(deployment), "flags": flags, "next_card": next_card}, indent=2))
    else:
        show(Console(), deployment, next_card)


def find_own_card() -> Card:
    """Return this machine's card, or its memory as a CPU's; MAX_CUDA_VRAM makes it one of less."""
    return find_own().card


def find_own() -> "Found":
    """Return this machine's card as find_own_card does, and what is free of it."""
    found = probe()
    card = shrink(found.card, os.environ.get("MAX_CUDA_VRAM", ""))
    return Found(card=card, free_bytes=min(found.free_bytes, card.memory_bytes))


def find_named(name: str) -> Card:
    """Return the card of that name."""
    try:
        return find_card(name)
    except UnknownCardError as error:
        raise typer.BadParameter(str(error), param_hint="--card") from error


def shrink(card: Card, max_vram: str) -> Card:
    """Return a card with no more than so many GB, if any; where there is none, one is made up."""
    try:
        memory_gib = parse_vram(max_vram)
    except ValueError as error:
        raise typer.BadParameter(f"is {max_vram!r}; {error}", param_hint="MAX_CUDA_VRAM") from error
    if memory_gib is None:
        return card
    if card.capability is None:
        return Card(name=f"a made-up card of {memory_gib:g} GB", memory_gib=memory_gib, capability=(8, 0))
    return replace(card, name=f"{card.name}, as if of {memory_gib:g} GB", memory_gib=min(memory_gib, card.memory_gib))


def read_budgets(texts: list[str], total_bytes: int) -> dict[Service, int]:
    """Read budgets such as lm=3GiB, fractions being of a total."""
    budgets: dict[Service, int] = {}
    for text in texts:
        name, _, amount = text.partition("=")
        service = next((known for known in get_args(Service) if known == name), None)
        if service is None or service in budgets:
            raise typer.BadParameter(f"is {text!r}; must be lm=, dit= or vae=, each once", param_hint="--gpu-memory")
        try:
            memory = parse_memory(amount)
        except ValueError as error:
            raise typer.BadParameter(f"{name}: {error}", param_hint="--gpu-memory") from error
        budgets[service] = memory.size_bytes or memory.of(total_bytes)
    return budgets


def ask(command: Sequence[str]) -> str | None:
    """Return what a program prints; None where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A card of this machine, and what nobody has taken of it."""

    card: Card
    free_bytes: int


def probe(run: Callable[[Sequence[str]], str | None] = ask) -> Found:
    """Ask the driver, or torch, each in a process of its own; a machine without a card is a CPU with its memory.

    Only torch knows which of several cards is the first, and which may be seen.
    """
    lines = (run(_SMI) or "").splitlines()
    driver_says = read_card(lines[0]) if lines else None
    if driver_says is not None and len(lines) == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return driver_says
    torch_says = run((sys.executable, "-c", _TORCH_PROBE))
    found = driver_says if torch_says is None else read_card(torch_says)
    if found is not None:
        return found
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Found(card=Card(memory_gib=memory_bytes / GIB), free_bytes=memory_bytes)


def read_card(answer: str) -> Found | None:
    """Read a probe's line "name, MiB, free MiB, capability[, is ROCm]"; None if it is no such line."""
    fields = [field.strip() for field in answer.partition("\n")[0].split(",")]
    try:
        name, memory_mib, free_mib, capability, *rocm = fields
        major, minor = map(int, capability.split("."))
        card = Card(name=name, memory_gib=float(memory_mib) / 1024, capability=(major, minor), is_rocm=rocm == ["1"])
        return Found(card=card, free_bytes=int(float(free_mib) * MIB))
    except ValueError:
        return None


def show(console: Console, deployment: Deployment, next_card: str) -> None:
    """Print a deployment for people, and what a larger card would have."""
    card = deployment.card
    kind = "no card" if card.capability is None else "capability " + ".".join(map(str, card.capability))
    memory = f"{card.memory_gib:.1f} GiB, {size(deployment.usable_bytes)} of it to share"
    console.print(f"{card.name}: {kind}, {memory}; tier {deployment.tier.name}", highlight=False)
    if deployment.plans:
        show_plans(console, deployment)
    else:
        console.print("nothing is planned")
    for words in deployment.given_up:
        console.print(f"given up: {words}", highlight=False)
    if next_card:
        console.print(f"next: {next_card}", highlight=False)
    for plan in deployment.plans:  # to be copied, so in one line each
        flags = " ".join(plan.flags)
        console.print(f"python -m soundstage_{plan.service} --model MODEL {flags}", soft_wrap=True, highlight=False)


def show_plans(console: Console, deployment: Deployment) -> None:
    """Print what each service runs, and the memory that it needs."""
    table = Table("", "model", "runs in", "offload", "longest", "at once", "--gpu-memory", "needs")
    for plan in deployment.plans:
        table.add_row(
            plan.service,
            plan.variant,
            " ".join(filter(None, [plan.engine, plan.dtype, plan.quantization.replace("none", "")])),
            plan.offload,
            f"{plan.max_duration_s / 60:g} min",
            str(plan.max_batch),
            size(plan.budget_bytes),
            size(plan.need.peak),
        )
    console.print(table)
    for plan in deployment.plans:
        console.print(bar(plan, deployment.usable_bytes))
    legend = Text("    ")
    for part, (cell, style) in _PARTS.items():
        legend.append(f" {cell}", style).append(f" {part}")
    console.print(legend)
    free = deployment.usable_bytes - deployment.used_bytes
    console.print(f"{size(deployment.used_bytes)} in all, {size(free)} left", highlight=False)


def bar(plan: Plan, total_bytes: int) -> Text:
    """Draw a service's need, part after part, beside the whole of what there is to share."""
    drawn = Text(f"{plan.service:4} ")
    end_bytes = cells = 0
    for part, (cell, style) in _PARTS.items():
        end_bytes += getattr(plan.need, part)
        width = round(_BAR_CELLS * end_bytes / total_bytes) - cells
        drawn.append(cell * width, style)
        cells += width
    return drawn.append("·" * (_BAR_CELLS - cells), "dim").append(f" {size(plan.need.total)}")


def draw(deployment: Deployment, path: Path) -> None:
    """Draw all needs as stacked bars into a PNG."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise typer.BadParameter("needs matplotlib, which is not installed", param_hint="--plot") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 2.5), layout="constrained")
    names = [plan.service for plan in deployment.plans]
    starts = [0.0] * len(names)
    for part in _PARTS:
        widths = [getattr(plan.need, part) / GIB for plan in deployment.plans]
        axes.barh(names, widths, left=starts, label=part)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.axvline(deployment.usable_bytes / GIB, color="black", linestyle=":")
    axes.set(
        title=f"{deployment.card.name}, tier {deployment.tier.name}",
        xlabel="GiB; the dotted line is what there is to share",
    )
    axes.invert_yaxis()
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: no picture ends in that
        raise typer.BadParameter(f"is {str(path)!r}, which cannot be written: {error}", param_hint="--plot") from error
    finally:
        pyplot.close(figure)
