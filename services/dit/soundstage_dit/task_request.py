"""From the wire to a Task: times become frames, modes become numbers."""

from typing import Final, Literal

from soundstage.type.v1 import task_pb2
from soundstage_dit.song import Complete, Cover, Edit, Extract, Lego, Repaint, Task, TextToMusic
from soundstage_runtime.repaint import kept_share
from soundstage_runtime.score import SAMPLE_RATE_HZ, SAMPLES_PER_LATENT

BLEND_FRAMES: Final = 25  # of the most careful repaint

_EDIT_CONTEXTS: Final[dict[task_pb2.EditContext.ValueType, Literal["silence", "codes", "latents"]]] = {
    task_pb2.EDIT_CONTEXT_UNSPECIFIED: "silence",
    task_pb2.EDIT_CONTEXT_SILENCE: "silence",
    task_pb2.EDIT_CONTEXT_CODES: "codes",
    task_pb2.EDIT_CONTEXT_LATENTS: "latents",
}


def read_task(task: task_pb2.Task, *, num_frames: int) -> Task:
    """Fill in what a checked task leaves open, for a source of `num_frames`."""
    match task.WhichOneof("kind"):
        case "cover":
            return Cover(
                strength=task.cover.strength if task.cover.HasField("strength") else 1.0,
                noise_strength=task.cover.noise_strength,
                from_latents=task.cover.from_latents,
            )
        case "repaint":
            return _repaint(task.repaint, num_frames)
        case "extract":
            return Extract(track=_track(task.extract.track))
        case "lego":
            return _lego(task.lego, num_frames)
        case "complete":
            return Complete(tracks=tuple(name for name in map(_track, task.complete.tracks) if name))
        case "edit":
            return _edit(task.edit)
        case None:
            return TextToMusic()


def _repaint(repaint: task_pb2.Repaint, num_frames: int) -> Repaint:
    start, end = _window(repaint.start_s, repaint.end_s if repaint.HasField("end_s") else None, num_frames)
    kept = kept_share(repaint)
    return Repaint(start=start, end=end, injection=kept, blend_frames=round(BLEND_FRAMES * kept))


def _lego(lego: task_pb2.Lego, num_frames: int) -> Lego:
    if not (lego.HasField("start_s") or lego.HasField("end_s")):
        return Lego(track=_track(lego.track), mix=lego.global_caption)
    start, end = _window(lego.start_s, lego.end_s if lego.HasField("end_s") else None, num_frames)
    return Lego(track=_track(lego.track), start=start, end=end, mix=lego.global_caption)


def _window(start_s: float, end_s: float | None, num_frames: int) -> tuple[int, int]:
    """Return the frames [start, end) of a window in seconds, inside of the song and at least one frame long."""
    start = min(max(_frame(start_s), 0), num_frames - 1)
    end = num_frames if end_s is None else min(max(_frame(end_s), start + 1), num_frames)
    return start, end


def _frame(time_s: float) -> int:
    return round(time_s * SAMPLE_RATE_HZ) // SAMPLES_PER_LATENT


def _track(track: task_pb2.Track.ValueType) -> str | None:
    """Name a track as the prompts do, in small letters; None for none."""
    if track == task_pb2.TRACK_UNSPECIFIED:
        return None
    return task_pb2.Track.Name(track).removeprefix("TRACK_").lower()


def _edit(edit: task_pb2.Edit) -> Edit:
    return Edit(
        source_caption=edit.source_caption,
        source_lyrics=edit.source_lyrics,
        start=edit.start,
        end=edit.end if edit.HasField("end") else 1.0,
        averages=edit.averages if edit.HasField("averages") else 1,
        context=_EDIT_CONTEXTS[edit.context],
    )
