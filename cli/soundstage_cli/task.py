"""Tasks on the command line: which options each takes, and the message they make."""

from collections.abc import Sequence
from typing import Any, Final

import typer

from soundstage.type.v1.options_pb2 import SAMPLER_UNSPECIFIED, AdapterUse, Sampler
from soundstage.type.v1.task_pb2 import (
    REPAINT_MODE_UNSPECIFIED,
    TRACK_UNSPECIFIED,
    Complete,
    Cover,
    Edit,
    Extract,
    Lego,
    Repaint,
    RepaintMode,
    Task,
    Track,
)

_TAKES: Final[dict[str, tuple[str, ...]]] = {
    "cover": ("strength",),
    "repaint": ("start", "end", "strength", "mode"),
    "extract": ("track",),
    "lego": ("track", "start", "end", "mix_caption"),
    "complete": ("track",),
    "edit": ("source_caption", "source_lyrics_file"),
}
TASKS: Final = tuple(_TAKES)
SAMPLERS: Final = tuple(name.removeprefix("SAMPLER_").lower() for name in Sampler.keys()[1:])
TRACKS: Final = tuple(name.removeprefix("TRACK_").lower() for name in Track.keys()[1:])
MODES: Final = tuple(name.removeprefix("REPAINT_MODE_").lower() for name in RepaintMode.keys()[1:])


def read_task(name: str | None, **given: Any) -> Task | None:
    """Make a task of the options given, None or empty for those that are not; raises BadParameter."""
    given = {option: value for option, value in given.items() if value not in (None, "", [])}
    if name is not None:
        _check_one_of("--task", name, TASKS)
    for option in given:
        if name is None or option not in _TAKES[name]:
            fitting = ", ".join(task for task in TASKS if option in _TAKES[task])
            raise typer.BadParameter(f"goes with --task {fitting}", param_hint=f"--{option.replace('_', '-')}")
    tracks = [read_track(track) for track in given.get("track", ())]
    if name in ("extract", "lego") and len(tracks) > 1:
        raise typer.BadParameter(f"--task {name} takes one", param_hint="--track")
    track = tracks[0] if tracks else TRACK_UNSPECIFIED
    start, end, strength = given.get("start"), given.get("end"), given.get("strength")
    match name:
        case "cover":
            return Task(cover=Cover(strength=strength))
        case "repaint":
            mode = read_mode(given["mode"]) if "mode" in given else REPAINT_MODE_UNSPECIFIED
            return Task(repaint=Repaint(start_s=start or 0, end_s=end, mode=mode, strength=strength))
        case "extract":
            return Task(extract=Extract(track=track))
        case "lego":
            mix = given.get("mix_caption", "")
            return Task(lego=Lego(track=track, start_s=start, end_s=end, global_caption=mix))
        case "complete":
            return Task(complete=Complete(tracks=tracks))
        case "edit":
            source_lyrics = given.get("source_lyrics_file", "")
            return Task(edit=Edit(source_caption=given.get("source_caption", ""), source_lyrics=source_lyrics))
        case _:
            return None


def read_track(name: str) -> Track.ValueType:
    """Read a track's name; raises BadParameter."""
    _check_one_of("--track", name, TRACKS)
    return Track.Value(f"TRACK_{name.upper()}")


def read_mode(name: str) -> RepaintMode.ValueType:
    """Read a mode's name; raises BadParameter."""
    _check_one_of("--mode", name, MODES)
    return RepaintMode.Value(f"REPAINT_MODE_{name.upper()}")


def read_sampler(name: str | None) -> Sampler.ValueType:
    """Read a sampler's name, None for the default; raises BadParameter."""
    if name is None:
        return SAMPLER_UNSPECIFIED
    _check_one_of("--sampler", name, SAMPLERS)
    return Sampler.Value(f"SAMPLER_{name.upper()}")


def read_adapters(uses: Sequence[str]) -> list[AdapterUse]:
    """Read "name" or "name:scale"; raises BadParameter."""
    found: list[AdapterUse] = []
    for use in uses:
        name, colon, scale = use.partition(":")
        try:
            found.append(AdapterUse(name=name, scale=float(scale) if colon else None))
        except ValueError as error:
            message = f"is {use!r}; must be a name, or a name and a number: warm:0.5"
            raise typer.BadParameter(message, param_hint="--adapter") from error
    return found


def _check_one_of(hint: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise typer.BadParameter(f"is {value!r}; must be one of {', '.join(known)}", param_hint=hint)
