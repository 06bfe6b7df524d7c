"""What a person sees: live progress, a timeline, the state of processes, an error in words."""

import grpc
import grpc.aio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, STAGE_VAE, Completed, GenerateSongResponse
from soundstage_cli.stack import Stack
from soundstage_cli.take import Take
from soundstage_runtime.errors import read_details

_STAGE_WORDS = {STAGE_LM: "plan (codes)", STAGE_DIT: "diffuse (steps)"}
_BAR_CELLS = 48
_HINTS = {
    "KEY_MISSING": "Set SOUNDSTAGE_KEY to a key of this gateway's, and `soundstage` sends it with every call.",
    "KEY_UNKNOWN": "SOUNDSTAGE_KEY is set to a key that this gateway does not know.",
    "NO_ADAPTER_DIRECTORY": "With `soundstage up`, set SOUNDSTAGE_DIT_ADAPTER_DIR to the directory before it starts.",
}


class SongView:
    """Progress bars that follow the events of a call; a context manager."""

    def __init__(self, console: Console, *, variants: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._console = console
        self._variants = variants
        self._rates: dict[int, int] = {}
        self._told: set[str] = set()
        self._tasks: dict[tuple[int, str], TaskID] = {}

    def __enter__(self) -> "SongView":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tell(self, line: str) -> None:
        """Print a line above the bars."""
        self._console.print(line, highlight=False, markup=False)

    def show(self, event: GenerateSongResponse) -> None:
        """Show one event; what comes again after a lost connection is told once."""
        if event.HasField("accepted"):
            seeds = ", ".join(map(str, event.accepted.seeds))
            self._tell_once(f"{event.accepted.song}, seed {seeds}")
        elif event.HasField("plan"):
            plan = event.plan.metadata
            fields = [
                f"{plan.bpm} bpm" if plan.HasField("bpm") else "",
                plan.key_scale,
                f"{plan.time_signature} beats a bar" if plan.time_signature else "",
                f"{plan.duration_s:g} s",
            ]
            self._tell_once(f"{self._label(event)}plan: " + ", ".join(filter(None, fields)))
        elif event.HasField("queued"):
            queued = event.queued
            self._tell_once(f"{self._label(event)}waits: {queued.position} before it, about {queued.wait_s:.0f} s")
        elif event.HasField("progress"):
            self._move(event, _STAGE_WORDS[event.progress.stage], event.progress.done, event.progress.total)
        elif event.HasField("audio_header"):
            header = event.audio_header
            self._rates[event.variant] = header.format.sample_rate_hz
            stop = header.first_frame + header.frame_count
            self._move(event, "audio (s)", 0, stop // header.format.sample_rate_hz)
        elif event.HasField("audio_chunk"):
            end = event.audio_chunk.first_frame + event.audio_chunk.frame_count
            self._move(event, "audio (s)", end // self._rates[event.variant], None)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self.tell(line)

    def _move(self, event: GenerateSongResponse, what: str, done: int, total: int | None) -> None:
        key = (event.variant, what)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(self._label(event) + what, total=total)
        self._progress.update(self._tasks[key], completed=done)

    def _label(self, event: GenerateSongResponse) -> str:
        return f"[{event.variant + 1}] " if self._variants > 1 else ""


def show_timeline(console: Console, take: Take) -> None:
    """Draw when each stage worked and when audio came."""
    for variant, line in sorted(take.timelines.items()):
        if variant not in take.completed:
            continue
        end_s = max(line.last_audio_s, 1e-9)
        table = Table(title=f"variant {variant + 1}" if len(take.completed) > 1 else None, box=None)
        for column in ("stage", "from s", "to s", f"0 s {'-' * (_BAR_CELLS - 12)} {end_s:.2f} s"):
            table.add_column(column, justify="right" if column.endswith(" s") and len(column) < 8 else "left")
        rows = (
            (_first_work(take.completed[variant]), 0.0, line.planned_s, "cyan"),
            ("diffuse", line.planned_s, line.denoised_s, "magenta"),
            ("decode", line.header_s, line.last_audio_s, "green"),
            ("audio out", line.first_audio_s, line.last_audio_s, "bright_yellow"),
        )
        for name, from_s, to_s, colour in rows:
            before = round(from_s / end_s * _BAR_CELLS)
            cells = max(1, round((to_s - from_s) / end_s * _BAR_CELLS))
            bar = Text(" " * before + "█" * cells, style=colour)
            table.add_row(name, f"{from_s:.2f}", f"{to_s:.2f}", bar)
        console.print(table)
        made_s = take.completed[variant].metadata.duration_s
        console.print(
            f"{made_s:g} s of music; first audio after {line.first_audio_s:.2f} s, "
            f"{line.decode_share:.0%} into the decoding",
            highlight=False,
        )


def _first_work(song: Completed) -> str:
    """Name what came before the diffusion: planning, or hearing the source and the references."""
    stages = [timing.stage for timing in song.timings]
    if STAGE_LM in stages:
        return "plan"
    return "hear" if STAGE_VAE in stages else "wait"


def show_stack(stack: Stack) -> Table:
    """A table of the processes and their states."""
    colours = {"ready": "green", "died": "red", "warming": "yellow", "starting": "yellow"}
    table = Table(box=None)
    for column in ("process", "state", "address", "pid"):
        table.add_column(column)
    for member in stack.members.values():
        colour = colours.get(member.state, "white")
        address = f"127.0.0.1:{member.port}" if member.port else ""
        pid = str(member.process.pid) if member.process else ""
        table.add_row(member.name, Text(member.state, style=colour), address, pid)
    return table


def show_error(console: Console, error: grpc.aio.AioRpcError, *, address: str) -> None:
    """Say what went wrong, field by field, and what to do."""
    details = read_details(error)
    if error.code() is grpc.StatusCode.UNAVAILABLE and not details.reason:
        console.print(f"[red]No gateway answers[/] at {address}: is `soundstage up` running?")
    elif details.violations:
        console.print("[red]The request was refused:[/]")
        for violation in details.violations:
            console.print(f"  {violation.field} {violation.description}", highlight=False, markup=False)
    else:
        console.print(f"[red]{error.code().name}[/]: ", end="")
        console.print(error.details(), highlight=False, markup=False)
    hint = _HINTS.get(details.metadata.get("stage_reason") or details.reason)
    if hint is not None:
        console.print(hint, highlight=False)
    if details.retry_after_s is not None:
        console.print(f"Try again in {details.retry_after_s:g} s.", highlight=False)
