"""Options that several commands have, and what is made of them."""

from typing import Annotated, TextIO

import typer

from soundstage.type.v1.score_pb2 import SongMetadata

_MAX_UINT32 = 2**32 - 1

Caption = Annotated[str, typer.Argument(help="what the music is like")]
LyricsFile = Annotated[
    typer.FileText | None, typer.Option(encoding="utf-8", help="the words sung; - reads them from stdin")
]
Duration = Annotated[float | None, typer.Option(help="seconds, 1 to 600; else the planner decides")]
Seed = Annotated[int | None, typer.Option(min=0, max=_MAX_UINT32)]
Bpm = Annotated[int | None, typer.Option(min=0, max=_MAX_UINT32, help="30 to 300")]
Key = Annotated[str | None, typer.Option(help='"C major", "F# minor", "Am"')]
TimeSignature = Annotated[str | None, typer.Option(help="2, 3, 4 or 6; 4/4, 6/8")]
Language = Annotated[str | None, typer.Option(help="the language sung: en, zh, …")]
Instrumental = Annotated[bool, typer.Option("--instrumental", help="no voice")]
Steps = Annotated[int | None, typer.Option(min=0, max=_MAX_UINT32, help="diffusion steps, 1 to 20")]
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


def read_lyrics(file: TextIO | None) -> str:
    """Read the lyrics file; raises BadParameter when it is not text."""
    try:
        return file.read() if file else ""
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"is not UTF-8 text: {error.reason}", param_hint="--lyrics-file") from error
