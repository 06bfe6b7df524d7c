"""`soundstage profile`: what cards of several sizes run, what that is predicted to take, and what it takes."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Final

import grpc.aio
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from soundstage_budget.admit import BudgetsDoNotAddUpError
from soundstage_budget.cards import GIB, Card
from soundstage_budget.deployment import Deployment, Wishes
from soundstage_budget.plan import size
from soundstage_cli.checkpoint_sizes import read_sizes
from soundstage_cli.doctor import find_own_card
from soundstage_cli.forecast import find_batch, find_boundaries, forecast
from soundstage_cli.models import Models, ModelsError, find_models
from soundstage_cli.output import keep_writable
from soundstage_cli.peaks import measure, plan_within, read_baselines
from soundstage_cli.stack import ProcessDiedError

app = typer.Typer()
_TIERS: Final = "4,6,8,12,16,20,24"
_PARTS: Final = ("weights", "kv", "activations", "workspace", "context")
_LM_OR_NOT: Final = (("with_lm", True), ("without_lm", False))
console = Console(stderr=True)


@app.command()
def profile(
    more: Annotated[list[str] | None, typer.Argument(metavar="[GB]...", help="more of --tiers")] = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(help=f"GB of the cards, with spaces or commas between them; else {_TIERS}", metavar="GB..."),
    ] = None,
    with_lm: Annotated[bool, typer.Option(help="with the language model that the tier has")] = False,
    boundary: Annotated[
        bool, typer.Option("--boundary", help="find the smallest tier without int8, and the smallest without offload")
    ] = False,
    batch_boundary: Annotated[
        bool, typer.Option("--batch-boundary", help="find the most songs at once, of 1, 2, 4 and 8, in each tier")
    ] = False,
    models: Annotated[
        Path | None, typer.Option(help="measure these too, in the hub's layout: on the card, or a CPU's memory")
    ] = None,
    songs: Annotated[int, typer.Option(min=1, max=8, help="measured: songs at once")] = 1,
    duration: Annotated[int, typer.Option(min=10, max=600, help="measured: seconds of a song")] = 10,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=keep_writable, help="a file to write all of it to")
    ] = None,
) -> None:
    """Predict what each tier runs and takes; with --models also run that, one tier after the other, and measure."""
    sizes_gib, card = read_tiers([*(tiers or []), *(more or [])] or [_TIERS]), find_own_card()
    told: dict[str, Any] = {"card": asdict(card), "predicted": predict(sizes_gib, with_lm=with_lm)}
    show_predicted(told["predicted"])
    if boundary:
        told["boundary"] = {name: find_boundaries(sizes_gib, with_lm=lm) for name, lm in _LM_OR_NOT}
        show_boundaries(told["boundary"])
    if batch_boundary:
        told["batch_boundary"] = [
            {"memory_gib": memory, **{name: find_batch(memory, with_lm=lm) for name, lm in _LM_OR_NOT}}
            for memory in sizes_gib
        ]
        show_batches(told["batch_boundary"])
    told["note"] = "" if models else f"predicted, not measured: {_why_not(card)}"
    if models is None:
        console.print(told["note"], highlight=False)
    else:
        try:
            told["measured"] = measure_all(card, sizes_gib, find_models(models), songs=songs, duration_s=duration)
        except ModelsError as error:
            raise typer.BadParameter(str(error), param_hint="--models") from error
        show_measured(told["measured"])
    if json_file is not None:
        json_file.write_text(json.dumps(told, indent=2) + "\n")


def _why_not(card: Card) -> str:
    return ("there is no CUDA here; " if card.capability is None else "") + "--models DIR runs and measures those"


def read_tiers(texts: Iterable[str]) -> list[float]:
    """Read sizes of cards in GB, rising."""
    words = [word for text in texts for word in text.replace(",", " ").split()]
    try:
        sizes = sorted({float(word) for word in words})
    except ValueError:
        sizes = []
    if not sizes or not all(0 < memory < 1000 for memory in sizes):
        raise typer.BadParameter(f"is {' '.join(words)!r}; must be GB of cards, as 6,8,16", param_hint="--tiers")
    return sizes


def predict(tiers: Sequence[float], *, with_lm: bool) -> list[dict[str, Any]]:
    """Plan each tier."""
    told: list[dict[str, Any]] = []
    for memory in tiers:
        found = forecast(memory, Wishes(lm="auto" if with_lm else "none"))
        if isinstance(found, Deployment):
            plans = [{**asdict(plan), "peak_bytes": plan.need.peak} for plan in found.plans]
            rest = {"tier": found.tier.name, "plans": plans, "given_up": found.given_up, "refused": ""}
        else:
            rest = {"plans": [], "refused": found}
        told.append({"memory_gib": memory, **rest})
    return told


def measure_all(
    card: Card, tiers: Sequence[float], models: Models, *, songs: int, duration_s: int
) -> list[dict[str, Any]]:
    """Run each tier's plan of the models there are and measure it; raises ModelsError."""
    sizes = read_sizes(models)
    baselines = read_baselines() if card.capability is None else {}
    told: list[dict[str, Any]] = []
    for memory in track(tiers, "measuring", console=console):
        row: dict[str, Any] = {"memory_gib": memory, "services": [], "refused": ""}
        try:
            plans = plan_within(card, memory, sizes, songs=songs, duration_s=duration_s)
            row |= {"songs": plans[0].max_batch, "duration_s": plans[0].max_duration_s}
            peaks = asyncio.run(measure(card, plans, models, baselines=baselines))
            row["services"] = [
                {"service": p.service, "predicted_bytes": p.need.peak, "measured_bytes": peaks[p.service]}
                for p in plans
            ]
        except (BudgetsDoNotAddUpError, ProcessDiedError) as error:
            row["refused"] = str(error)
        except grpc.aio.AioRpcError as error:
            row["refused"] = error.details()
        told.append(row)
    return told


def show_predicted(told: Sequence[dict[str, Any]]) -> None:
    """Print the plans of all tiers."""
    table = Table(
        "GB", "tier", "", "model", "runs in", "offload", "minutes", "at once", "tile", " + ".join(_PARTS), "peak"
    )
    for row in told:
        for plan in row["plans"]:
            table.add_row(
                f"{row['memory_gib']:g}",
                row["tier"],
                plan["service"],
                plan["variant"],
                " ".join(filter(None, [plan["engine"], plan["dtype"], plan["quantization"].replace("none", "")])),
                plan["offload"],
                f"{plan['max_duration_s'] / 60:g}",
                str(plan["max_batch"]),
                str(plan["window_frames"] or ""),
                " + ".join(f"{plan['need'][part] / GIB:.2f}" for part in _PARTS),
                size(plan["peak_bytes"]),
            )
    console.print(table)
    show_refused(told)


def show_boundaries(told: dict[str, dict[str, float | None]]) -> None:
    """Print the smallest tier for each mode."""
    table = Table("the smallest GB for", "with a planner", "without")
    for mode in told["with_lm"]:
        table.add_row(mode, *(f"{found[mode]:g}" if found[mode] else "none of them" for found in told.values()))
    console.print(table)


def show_batches(told: Sequence[dict[str, Any]]) -> None:
    """Print the most songs at once for each tier."""
    table = Table("GB", "at once with a planner", "without")
    for row in told:
        table.add_row(*(f"{row[name]:g}" for name in ("memory_gib", "with_lm", "without_lm")))
    console.print(table)
    console.print("at most: more than in the plans above takes more offloading, which is slower", highlight=False)


def show_measured(told: Sequence[dict[str, Any]]) -> None:
    """Print what was predicted beside what was measured."""
    table = Table("GB", "", "predicted", "measured", "measured of it")
    for row in told:
        for part in row["services"]:
            taken, predicted = part["measured_bytes"], part["predicted_bytes"]
            measured = ("the driver does not say", "") if taken is None else (size(taken), f"{taken / predicted:.0%}")
            table.add_row(f"{row['memory_gib']:g}", part["service"], size(predicted), *measured)
    console.print(table)
    show_refused(told)


def show_refused(told: Sequence[dict[str, Any]]) -> None:
    """Say what is the matter with the tiers that nothing fits."""
    for row in told:
        if row["refused"]:
            console.print(f"{row['memory_gib']:g} GB: {row['refused']}", markup=False, highlight=False)
