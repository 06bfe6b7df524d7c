"""How audio is to be written: options that commands share, and what is made of them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from soundstage.music.v1.song_service_pb2 import OutputOptions
from soundstage.type.v1.audio_pb2 import (
    ENCODING_FLAC,
    ENCODING_MP3,
    ENCODING_MP4_AAC,
    ENCODING_OGG_OPUS,
    ENCODING_PCM,
    ENCODING_WAV,
    ENCODING_WEBM_OPUS,
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_S24,
    SAMPLE_FORMAT_UNSPECIFIED,
    AudioFormat,
    Encoding,
)
from soundstage_cli.options import number, whole

_ENCODINGS: Final = {
    "wav": ENCODING_WAV,
    "flac": ENCODING_FLAC,
    "mp3": ENCODING_MP3,
    "ogg": ENCODING_OGG_OPUS,
    "webm": ENCODING_WEBM_OPUS,
    "m4a": ENCODING_MP4_AAC,
    "pcm": ENCODING_PCM,
}
_SAMPLE_FORMATS: Final = {"s16": SAMPLE_FORMAT_S16, "s24": SAMPLE_FORMAT_S24, "f32": SAMPLE_FORMAT_F32}
T = TypeVar("T")

OutputName = Annotated[
    str, typer.Option("--output", "-o", help=f"a file, whose ending says how: {', '.join(_ENCODINGS)}; - for stdout")
]
EncodingName = Annotated[
    str | None, typer.Option("--encoding", help="how, in place of the file's ending; pcm for stdout")
]
SampleFormatName = Annotated[
    str | None, typer.Option("--sample-format", help=f"of pcm, wav and flac: {', '.join(_SAMPLE_FORMATS)}")
]
SampleRate = Annotated[int | None, typer.Option(parser=whole(1), help="Hz: 48000, 44100 or 24000")]
Mono = Annotated[bool, typer.Option("--mono", help="the mean of both channels")]
BitRate = Annotated[int | None, typer.Option(parser=whole(1), help="bits a second: 32000 to 320000")]
Gain = Annotated[float, typer.Option(parser=number(), help="dB, -60 to 20")]
FadeIn = Annotated[float, typer.Option(parser=number(), help="over the song's first seconds, 0 to 60")]
FadeOut = Annotated[float, typer.Option(parser=number(), help="over the song's last seconds, 0 to 60")]


def read_output(
    output: str,
    *,
    encoding: str | None,
    sample_format: str | None,
    sample_rate: int | None,
    mono: bool,
    bit_rate: int | None,
    gain: float,
    fade_in: float,
    fade_out: float,
) -> OutputOptions:
    """Gather how a file, or stdout as "-", is to be written; the gateway checks what numbers may be.

    Raises BadParameter, for a file that cannot be written too.
    """
    if encoding is not None:
        chosen = _look_up("--encoding", encoding, _ENCODINGS)
    else:
        chosen = ENCODING_PCM if output == "-" else read_ending(Path(output))
    if output != "-":
        check_writable(Path(output))
    written = AudioFormat(
        encoding=chosen,
        sample_format=SAMPLE_FORMAT_UNSPECIFIED
        if sample_format is None
        else _look_up("--sample-format", sample_format, _SAMPLE_FORMATS),
        sample_rate_hz=sample_rate or 0,
        channels=1 if mono else 0,
        bit_rate_bps=bit_rate or 0,
    )
    return OutputOptions(format=written, gain_db=gain, fade_in_s=fade_in, fade_out_s=fade_out)


def read_ending(path: Path, known: Iterable[str] = _ENCODINGS) -> Encoding.ValueType:
    """Read off a file's name how it is written; raises BadParameter."""
    name = path.suffix.lower().removeprefix(".")
    if name not in known:
        endings = ", ".join(f".{ending}" for ending in known)
        raise typer.BadParameter(f"is {str(path)!r}; must end in one of {endings}", param_hint="--output")
    return _ENCODINGS[name]


def keep_writable(path: Path | None) -> Path | None:
    """Pass on an option that names a file to write; raises BadParameter, before anything is made for the file."""
    if path is not None:
        check_writable(path, hint=None)
    return path


def check_writable(path: Path, hint: str | None = "--output") -> None:
    """Refuse a file that could not be written; `hint` names its option, None the one that is being read."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise typer.BadParameter(f"is {str(path)!r}, which cannot be written", param_hint=hint)


def _look_up(hint: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise typer.BadParameter(f"is {name!r}; must be one of {', '.join(known)}", param_hint=hint)
    return known[name]
