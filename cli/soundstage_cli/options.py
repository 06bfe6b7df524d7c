"""Options that several commands have, and what is made of them."""

from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path
from typing import Annotated, Final, TextIO, TypeVar

import typer

from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_cli.task import MODES, SAMPLERS, TASKS, TRACKS

MAX_UINT32: Final = 2**32 - 1
N = TypeVar("N", int, float)


def number(low: float = -inf, high: float = inf) -> Callable[[str], float]:
    """Return a parser of numbers in a range, both ends included; it raises BadParameter with what was given."""
    return _parser(float, "a number", low, high)


def whole(low: int, high: int = MAX_UINT32) -> Callable[[str], int]:
    """Return a parser of whole numbers, likewise."""
    return _parser(int, "a whole number", low, high)


def _parser(kind: type[N], what: str, low: float, high: float) -> Callable[[str], N]:
    wanted = f"{what} from {low:.10g} to {high:.10g}" if isfinite(high) else what

    def parse(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (isfinite(value) and low <= value <= high):
            raise typer.BadParameter(f"is {text!r}; must be {wanted}")
        return value

    return parse


Caption = Annotated[str, typer.Argument(help="what the music is like")]
LyricsFile = Annotated[
    typer.FileText | None, typer.Option(encoding="utf-8", help="the words sung; - reads them from stdin")
]
Duration = Annotated[float | None, typer.Option(parser=number(), help="seconds, 1 to 600; else the planner decides")]
Seed = Annotated[
    int | None,
    typer.Option(parser=whole(0), help="0 to 4294967295; the same seed makes the same song, else one is drawn"),
]
Bpm = Annotated[int | None, typer.Option(parser=whole(0), help="30 to 300")]
Key = Annotated[str | None, typer.Option(help='"C major", "F# minor", "Am"')]
TimeSignature = Annotated[str | None, typer.Option(help="2, 3, 4 or 6; 4/4, 6/8")]
Language = Annotated[str | None, typer.Option(help="the language sung: en, zh, …")]
Instrumental = Annotated[bool, typer.Option("--instrumental", help="no voice")]
Steps = Annotated[int | None, typer.Option(parser=whole(0), help="diffusion steps, 1 to 200; on a turbo model 20")]
Shift = Annotated[float | None, typer.Option(parser=number(), help="bends the steps towards noise, 1 to 5")]
GuidanceScale = Annotated[
    float | None, typer.Option(parser=number(), help="how far towards the words, 1 to 15; not on a turbo model")
]
SamplerName = Annotated[str | None, typer.Option("--sampler", help=", ".join(SAMPLERS))]
Adapters = Annotated[list[str] | None, typer.Option("--adapter", help="a loaded one, name or name:scale; repeatable")]
TaskName = Annotated[str | None, typer.Option("--task", help=f"what to do with --source: {', '.join(TASKS)}")]
Source = Annotated[Path | None, typer.Option(help="the file to work on: wav, flac, mp3, ogg, m4a")]
References = Annotated[list[Path] | None, typer.Option("--reference", help="a file to sound like; repeatable, up to 4")]
Start = Annotated[
    float | None, typer.Option(parser=number(), help="repaint, lego: seconds; below 0 begins before the source")
]
End = Annotated[
    float | None, typer.Option(parser=number(), help="repaint, lego: seconds; beyond the source makes it longer")
]
Tracks = Annotated[
    list[str] | None, typer.Option("--track", help=f"extract, lego, complete: {', '.join(TRACKS)}; repeatable")
]
Strength = Annotated[
    float | None, typer.Option(parser=number(), help="cover: how much is followed; repaint: how free; 0 to 1")
]
Mode = Annotated[str | None, typer.Option(help=f"repaint: {', '.join(MODES)}")]
MixCaption = Annotated[str, typer.Option(help="lego, on a model for stems: what the whole mix is like")]
Model = Annotated[str, typer.Option(help="the diffusion model: models/dit/NAME, or its variant, such as xl-turbo")]
SourceCaption = Annotated[str, typer.Option(help="edit: what the source is like")]
SourceLyricsFile = Annotated[typer.FileText | None, typer.Option(encoding="utf-8", help="edit: the words sung in it")]
Gateway = Annotated[str, typer.Option(help="the gateway's address")]

GATEWAY = "127.0.0.1:50050"


def read_metadata(
    *,
    duration: float | None = None,
    bpm: int | None = None,
    key: str | None = None,
    time_signature: str | None = None,
    language: str | None = None,
) -> SongMetadata:
    """Gather what is given; the gateway checks it."""
    for hint, words in (("--key", key), ("--time-signature", time_signature), ("--language", language)):
        check_words(hint, words or "")
    return SongMetadata(
        duration_s=duration, bpm=bpm, key_scale=key, time_signature=time_signature, vocal_language=language
    )


def check_words(hint: str, words: str) -> None:
    """Refuse an argument whose bytes were no UTF-8."""
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter("is not UTF-8 text", param_hint=hint) from error


def read_lyrics(file: TextIO | None, *, hint: str = "--lyrics-file") -> str:
    """Read a lyrics file; raises BadParameter when it is not text."""
    try:
        return file.read() if file else ""
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"is not UTF-8 text: {error.reason}", param_hint=hint) from error
