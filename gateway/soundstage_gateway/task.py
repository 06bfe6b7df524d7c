"""A task laid out on its source: the canvas, the task in the canvas's own time, and what of the source is kept."""

from dataclasses import dataclass
from typing import Final

from soundstage.type.v1.task_pb2 import (
    Lego,
    Repaint,
    Task,
)
from soundstage_gateway.canvas import Canvas
from soundstage_gateway.splice import Splice
from soundstage_runtime.repaint import kept_share
from soundstage_runtime.score import DURATION_RANGE_S, SAMPLE_RATE_HZ, SAMPLES_PER_LATENT
from soundstage_runtime.validation import Checks

_LONGEST_FADE_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A task whose times count from the canvas's beginning, and the splice that follows it, if one does."""

    task: Task
    canvas: Canvas
    splice: Splice | None = None


def lay_out(checks: Checks, task: Task, source_frames: int) -> Layout:
    """Lay a task out on a source of so many frames; what does not fit is refused."""
    if task.HasField("repaint"):
        return _lay_out_repaint(checks, task.repaint, source_frames)
    canvas = _canvas(checks, source_frames, lead_frames=0, num_frames=source_frames, field="source")
    if task.HasField("lego"):
        _check_lego(checks, task.lego, canvas.duration_s)
    return Layout(task=task, canvas=canvas)


def _lay_out_repaint(checks: Checks, repaint: Repaint, source_frames: int) -> Layout:
    """Make the canvas as long as its window wants, and move the window to the canvas's own time."""
    start = round(repaint.start_s * SAMPLE_RATE_HZ)
    end = round(repaint.end_s * SAMPLE_RATE_HZ) if repaint.HasField("end_s") else source_frames
    _check_window(checks, repaint, start, end, source_frames)
    lead = max(0, -start)
    reach = lead + max(source_frames, end)
    field = "task.repaint" if reach > source_frames else "source"
    canvas = _canvas(checks, source_frames, lead_frames=lead, num_frames=reach, field=field)
    task = Task(repaint=repaint)
    task.repaint.start_s = (start + lead) / SAMPLE_RATE_HZ
    task.repaint.end_s = (end + lead) / SAMPLE_RATE_HZ
    return Layout(task=task, canvas=canvas, splice=_splice(repaint, canvas, start + lead, end + lead))


def _check_window(checks: Checks, repaint: Repaint, start: int, end: int, length: int) -> None:
    """Refuse a window, frames [start, end), that is empty, or does not touch a source of `length` frames."""
    if end < 0:
        checks.refuse("task.repaint.end_s", f"is {repaint.end_s:g}; must be at least 0, where the source begins")
    if start > length:
        source_s = length / SAMPLE_RATE_HZ
        checks.refuse("task.repaint.start_s", f"is {repaint.start_s:g}; must be at most {source_s:g}, the source's end")
    elif end - start < SAMPLES_PER_LATENT:
        field = "end_s" if repaint.HasField("end_s") else "start_s"
        window_s = (end - start) / SAMPLE_RATE_HZ
        checks.refuse(f"task.repaint.{field}", f"leaves a window of {window_s:g} s; it must be 0.04 s or longer")


def _canvas(checks: Checks, source_frames: int, *, lead_frames: int, num_frames: int, field: str) -> Canvas:
    canvas = Canvas(lead_frames=lead_frames, num_frames=num_frames)
    low, high = DURATION_RANGE_S
    if not low <= canvas.duration_s <= high:
        checks.refuse(field, f"makes a song of {canvas.duration_s:g} s; it must be {low:g} to {high:g} s long")
    return canvas


def _check_lego(checks: Checks, lego: Lego, duration_s: float) -> None:
    if lego.start_s >= duration_s:
        checks.refuse("task.lego.start_s", f"is {lego.start_s:g}; must be below {duration_s:g}, the source's end")
    if lego.end_s > duration_s:
        checks.refuse("task.lego.end_s", f"is {lego.end_s:g}; must be at most {duration_s:g}, the source's end")


def _splice(repaint: Repaint, canvas: Canvas, start: int, end: int) -> Splice | None:
    """Choose the crossfades by what is kept; None where nothing is."""
    kept = kept_share(repaint)
    if kept == 0:
        return None
    fade_frames = round(_LONGEST_FADE_S * kept * SAMPLE_RATE_HZ)
    return Splice(canvas=canvas, start=start, end=end, fade_frames=fade_frames)
