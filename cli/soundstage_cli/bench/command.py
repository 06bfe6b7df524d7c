"""`soundstage bench`."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TypeVar

import typer
from rich.console import Console

if TYPE_CHECKING:
    from soundstage_cli.bench.report import Report

R = TypeVar("R")

app = typer.Typer(no_args_is_help=True, help="Measure this machine.")
_DTYPES: Final = ("float32", "bfloat16", "float16")


@app.callback()
def bench() -> None:
    """Measure this machine."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background may have it ignored


@app.command()
def lm(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the figures")] = Path("bench"),
    size: Annotated[str, typer.Option(help="0.6B or tiny: the shape of the random planner")] = "0.6B",
    engine: Annotated[list[str] | None, typer.Option(help="torch or vllm; may be repeated")] = None,
    songs: Annotated[list[int] | None, typer.Option(min=1, help="songs at once; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often each is measured")] = 5,
    codes: Annotated[int, typer.Option(min=10, max=3000, help="codes of a song")] = 100,
    threads: Annotated[int, typer.Option(min=1, help="of each engine")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    cache: Annotated[Path, typer.Option(help="where the random planner is kept: 1.3 GB")] = Path(".bench"),
    vllm_python: Annotated[Path, typer.Option(help="an interpreter that has vLLM")] = Path(sys.executable),
) -> None:
    """Measure how fast songs are planned, against transformers' generate with guidance."""
    from soundstage_cli.bench.lm import SHAPES, Plan, measure  # torch and transformers take seconds to import
    from soundstage_cli.bench.lm_report import make_report
    from soundstage_cli.bench.stage import StageDiedError

    engines = engine or ["torch"]
    _check_choice("--size", SHAPES, size)
    _check_choice("--engine", ("torch", "vllm"), *engines)
    _check_device(device)
    _check_choice("--dtype", ("float32", "bfloat16"), dtype)
    if shutil.which(vllm_python) is None:
        raise typer.BadParameter(f"is {str(vllm_python)!r}, which cannot be run", param_hint="--vllm-python")
    _make_folder("--output", output)
    _make_folder("--cache", cache)
    plan = Plan(
        size=size,
        engines=engines,
        songs=songs or [1, 4, 8],
        rounds=rounds,
        num_codes=codes,
        threads=threads,
        device=device,
        dtype=dtype,
        cache=cache,
        vllm_python=vllm_python,
    )
    try:
        asyncio.run(_collect(measure(plan, _tell), output, partial(make_report, plan)))
    except StageDiedError as error:
        _fail(error)


@app.command()
def dit(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the figures")] = Path("bench"),
    size: Annotated[str, typer.Option(help="mid, 2B, XL or tiny: the shape of the random transformer")] = "mid",
    rounds: Annotated[int, typer.Option(min=1, help="how often each is measured")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="of the CPU")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; empty for what the device likes")] = "",
    max_seconds: Annotated[int, typer.Option(min=1, help="leave out songs longer than this")] = 600,
    compiled: Annotated[bool | None, typer.Option(help="measure both compiled too; without it, on cuda only")] = None,
) -> None:
    """Measure how long a diffusion step takes, against diffusers' transformer with the same weights."""
    from soundstage_cli.bench.dit import CASES, SIZES, Plan, measure  # torch and diffusers take seconds to import
    from soundstage_cli.bench.dit_report import make_report

    _check_choice("--size", SIZES, size)
    _check_device(device)
    dtype = dtype or _like(device)
    _check_choice("--dtype", _DTYPES, dtype)
    shortest_s = min(case.duration_s for case in CASES)
    if max_seconds < shortest_s:
        message = f"is {max_seconds}, shorter than any song that is measured; must be {shortest_s} or more"
        raise typer.BadParameter(message, param_hint="--max-seconds")
    _make_folder("--output", output)
    plan = Plan(
        size=size,
        cases=[case for case in CASES if case.duration_s <= max_seconds],
        rounds=rounds,
        threads=threads,
        device=device,
        dtype=dtype,
        is_compiled=device != "cpu" if compiled is None else compiled,
    )
    with keep(output, partial(make_report, plan)) as take:
        for runs in measure(plan, _tell):
            take(runs)


@app.command()
def vae(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the figures")] = Path("bench"),
    size: Annotated[str, typer.Option(help="real or tiny: the shape of the random codec")] = "real",
    seconds: Annotated[int, typer.Option(min=1, max=600, help="length of the song")] = 60,
    window: Annotated[list[int] | None, typer.Option(min=32, help="longest window; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often each is measured")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="of the CPU")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    compiled: Annotated[bool | None, typer.Option(help="measure ours compiled too; without it, on cuda only")] = None,
) -> None:
    """Measure how long a song's decoding takes, against diffusers' own tiled decode with the same weights."""
    from soundstage_cli.bench.vae import SIZES, Plan, make_report, measure  # torch and diffusers take seconds to import

    _check_choice("--size", SIZES, size)
    _check_device(device)
    _check_choice("--dtype", _DTYPES, dtype)
    _make_folder("--output", output)
    plan = Plan(
        size=size,
        duration_s=seconds,
        windows=window or [64, 256],
        rounds=rounds,
        threads=threads,
        device=device,
        dtype=dtype,
        is_compiled=device != "cpu" if compiled is None else compiled,
    )
    with keep(output, partial(make_report, plan)) as take:
        for runs in measure(plan, _tell):
            take(runs)


@app.command()
def stream(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the figures")] = Path("bench"),
    listeners: Annotated[int, typer.Option(min=1, help="of the gateway; the codec has at least as many")] = 32,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="length of a song")] = 20,
    gap: Annotated[float, typer.Option(min=0, help="seconds between listeners of the gateway, in the mean")] = 0.5,
    arrivals: Annotated[str, typer.Option(help="poisson or equal: how listeners come")] = "poisson",
    rounds: Annotated[int, typer.Option(min=1, help="how often each order is measured")] = 3,
    load: Annotated[
        float, typer.Option(min=0.1, max=2, help="of the codec: 1 is all that any order could serve")
    ] = 0.6,
    threads: Annotated[int, typer.Option(min=1, help="of the codec that is measured alone")] = 2,
    models: Annotated[Path, typer.Option(help="where the tiny checkpoints are kept")] = Path(".demo/models"),
    gateway: Annotated[str | None, typer.Option(help="a gateway that runs; else one is started")] = None,
) -> None:
    """Simulate listeners: how long they wait for the first sound, and how often the music runs dry.

    They listen through a gateway first, and then at the codec alone, which decodes in the order of who would run dry
    first or of who came first, in alternating rounds, with as many listeners as just load it.
    """
    import grpc.aio

    from soundstage_cli.bench.stream import Plan, compare_orders, measure_gateway  # torch takes seconds to import
    from soundstage_cli.bench.stream_report import make_report
    from soundstage_cli.demo import prepare_models
    from soundstage_cli.models import ModelsError
    from soundstage_cli.stack import ProcessDiedError
    from soundstage_cli.view import show_error

    _check_choice("--arrivals", ("poisson", "equal"), arrivals)
    _make_folder("--output", output)
    plan = Plan(
        listeners=listeners,
        song_s=seconds,
        gap_s=gap,
        is_poisson=arrivals == "poisson",
        rounds=rounds,
        load=load,
        threads=threads,
        models=models,
        gateway=gateway,
    )
    try:
        prepare_models(models, _tell)
        heard = asyncio.run(measure_gateway(plan, _tell))
        comparison = asyncio.run(compare_orders(plan, _tell))
    except grpc.aio.AioRpcError as error:
        show_error(Console(stderr=True), error, address=gateway or "the gateway that was started")
        raise typer.Exit(1) from error
    except (ModelsError, ProcessDiedError) as error:
        _fail(error)
    with keep(output, partial(make_report, plan, heard, comparison)) as take:
        take(comparison.runs)


@app.command()
def song(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the figures")] = Path("bench"),
    size: Annotated[str, typer.Option(help="2B, mid or tiny: the shape of the random models")] = "mid",
    seconds: Annotated[list[int] | None, typer.Option(min=1, max=600, help="length of a song; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="how often each is measured")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="of each process")] = 2,
    together: Annotated[int, typer.Option(min=0, help="songs in turn, and overlapping; 0 for neither")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda, for all of them")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; empty for what the device likes")] = "",
    compiled: Annotated[
        bool | None, typer.Option(help="measure diffusers' transformer compiled too; without it, on cuda only")
    ] = None,
    cache: Annotated[Path, typer.Option(help="where the random models are kept: 7 GB of size 2B")] = Path(".bench"),
) -> None:
    """Measure a whole song without a planner, against diffusers' pipeline and against our modules in one process."""
    from soundstage_cli.bench.song import SIZES, Plan, measure  # torch and diffusers take seconds to import
    from soundstage_cli.bench.song_report import make_report
    from soundstage_cli.stack import ProcessDiedError

    _check_choice("--size", SIZES, size)
    _check_device(device)
    dtype = dtype or _like(device)
    _check_choice("--dtype", _DTYPES, dtype)
    _make_folder("--output", output)
    _make_folder("--cache", cache)
    plan = Plan(
        size=size,
        durations_s=seconds or [60, 120],
        rounds=rounds,
        threads=threads,
        together=together,
        device=device,
        dtype=dtype,
        is_compiled=device != "cpu" if compiled is None else compiled,
        cache=cache,
    )
    try:
        asyncio.run(_collect(measure(plan, _tell), output, partial(make_report, plan)))
    except ProcessDiedError as error:
        _fail(error)


@app.command()
def history(
    folder: Annotated[Path, typer.Argument(help="folder that figures were written to")] = Path("bench"),
) -> None:
    """Show all ratios that were measured into a folder, the oldest first."""
    from soundstage_cli.bench.report import HISTORY, list_history

    if not (folder / HISTORY).is_file():
        raise typer.BadParameter(f"is {str(folder)!r}, which has no {HISTORY}", param_hint="FOLDER")
    Console().print(list_history(folder))


def _check_choice(option: str, wanted: Iterable[str], *held: str) -> None:
    """Refuse an option that holds other than what it may."""
    for name in held:
        if name not in wanted:
            raise typer.BadParameter(f"is {name!r}; must be one of {', '.join(wanted)}", param_hint=option)


def _check_device(device: str) -> None:
    """Refuse a device that is not here."""
    from soundstage_cli.bench.report import has_card

    _check_choice("--device", ("cpu", "cuda"), device)
    if device == "cuda" and not has_card():
        raise typer.BadParameter("is 'cuda', but torch finds no card here; must be cpu", param_hint="--device")


def _make_folder(option: str, folder: Path) -> None:
    """Make a folder before anything is measured for it; raises BadParameter."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"is {str(folder)!r}, which cannot be made: {error.strerror}"
        raise typer.BadParameter(message, param_hint=option) from error
    if not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"is {str(folder)!r}, which cannot be written to", param_hint=option)


def _like(device: str) -> str:
    """Name the arithmetic that a device likes."""
    return "float32" if device == "cpu" else "bfloat16"


def _tell(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)


def _fail(error: Exception) -> NoReturn:
    Console(stderr=True).print(str(error), style="red", markup=False, highlight=False)
    raise typer.Exit(1) from error


async def _collect(
    rounds: AsyncIterator[list[R]], output: Path, make_report: Callable[[Sequence[R]], "Report"]
) -> None:
    with keep(output, make_report) as take:
        async for runs in rounds:
            take(runs)


@contextmanager
def keep(output: Path, make_report: Callable[[Sequence[R]], "Report"]) -> Generator[Callable[[Sequence[R]], None]]:
    """Give what takes the runs of a round, and writes all there are: whoever is cut short leaves the rounds before.

    However the block ends, what was found is shown and added to the history.
    """
    from soundstage_cli.bench.report import remember, write_report

    found: list[R] = []
    paths: list[Path] = []

    def take(runs: Sequence[R]) -> None:
        found.extend(runs)
        paths[:] = write_report(output, make_report(found))

    try:
        yield take
    finally:
        if paths:
            Console().print(make_report(found).table)
            for path in (*paths, remember(paths[0])):
                _tell(f"wrote {path}")


if __name__ == "__main__":
    app()
