"""plan, draft, polish, describe, score: the language model alone."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import grpc.aio
import numpy as np
import soundfile
import soxr
import typer
from google.protobuf.json_format import MessageToJson, Parse, ParseError
from numpy.typing import NDArray
from rich.console import Console

from soundstage.music.v1.composer_service_pb2 import (
    DescribeAudioRequest,
    DescribeAudioSetup,
    DraftSongRequest,
    PlanSongRequest,
    PolishSongRequest,
    ScoreSongRequest,
)
from soundstage.music.v1.composer_service_pb2_grpc import ComposerServiceStub
from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32
from soundstage.type.v1.score_pb2 import ORIGIN_USER, Likelihood, SongText
from soundstage_cli import options
from soundstage_cli.channel import open_channel
from soundstage_cli.output import keep_writable
from soundstage_cli.view import show_error
from soundstage_runtime.pcm import audio_chunks
from soundstage_runtime.score import INSTRUMENTAL, SAMPLE_RATE_HZ

app = typer.Typer()
console = Console(stderr=True)

Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", callback=keep_writable, help="a .json file for `soundstage generate --request`"),
]

T = TypeVar("T")


@app.command()
def plan(
    caption: options.Caption = "",
    lyrics_file: options.LyricsFile = None,
    output: Output = None,
    duration: options.Duration = None,
    seed: options.Seed = None,
    bpm: options.Bpm = None,
    key: options.Key = None,
    time_signature: options.TimeSignature = None,
    language: options.Language = None,
    instrumental: options.Instrumental = False,
    rewrite_caption: Annotated[bool, typer.Option(help="let the model write a caption of its own")] = True,
    codes: Annotated[bool, typer.Option(help="write audio codes too")] = True,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Plan a song and show the plan as it is written. It can be edited and sent back with `generate --request`."""
    options.check_words("CAPTION", caption)
    request = PlanSongRequest(
        caption=caption,
        lyrics=options.read_lyrics(lyrics_file),
        instrumental=instrumental,
        metadata=options.read_metadata(
            duration=duration, bpm=bpm, key=key, time_signature=time_signature, language=language
        ),
        write_codes=codes,
        seed=seed,
    )
    request.planner.rewrite_caption = rewrite_caption
    made = ask(gateway, _plan(gateway, request))
    _keep(output, made)


async def _plan(gateway: str, request: PlanSongRequest) -> GenerateSongRequest:
    made = GenerateSongRequest(caption=request.caption, lyrics=request.lyrics, instrumental=request.instrumental)
    async with open_channel(gateway) as channel:
        async for event in ComposerServiceStub(channel).PlanSong(request):
            if event.HasField("started"):
                made.seeds.append(event.started.seed)
            elif event.HasField("field"):
                origin = "you" if event.field.origin == ORIGIN_USER else "the model"
                console.print(f"{event.field.name}: {event.field.value}  ({origin})", markup=False, highlight=False)
            elif event.HasField("plan"):
                made.metadata.CopyFrom(event.plan.metadata)
                made.caption = event.plan.caption or made.caption
            else:
                made.codes.extend(event.codes.codes)
                print(*event.codes.codes, end=" ", flush=True)
    if made.codes:
        print()
    return made


@app.command()
def draft(
    query: Annotated[str, typer.Argument(help="the idea, in a few words; nothing for any song")] = "",
    output: Output = None,
    instrumental: options.Instrumental = False,
    language: options.Language = None,
    seed: options.Seed = None,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Make caption, lyrics and metadata of an idea."""
    options.check_words("QUERY", query)
    options.check_words("--language", language or "")
    request = DraftSongRequest(query=query, instrumental=instrumental, vocal_language=language, seed=seed)

    async def call() -> SongText:
        async with open_channel(gateway) as channel:
            return (await ComposerServiceStub(channel).DraftSong(request)).text

    _keep(output, _show(ask(gateway, call())))


@app.command()
def polish(
    caption: options.Caption = "",
    lyrics_file: options.LyricsFile = None,
    output: Output = None,
    duration: options.Duration = None,
    bpm: options.Bpm = None,
    key: options.Key = None,
    time_signature: options.TimeSignature = None,
    language: options.Language = None,
    seed: options.Seed = None,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Write caption and lyrics better, and add the metadata that are missing."""
    options.check_words("CAPTION", caption)
    request = PolishSongRequest(
        caption=caption,
        lyrics=options.read_lyrics(lyrics_file),
        metadata=options.read_metadata(
            duration=duration, bpm=bpm, key=key, time_signature=time_signature, language=language
        ),
        seed=seed,
    )

    async def call() -> SongText:
        async with open_channel(gateway) as channel:
            return (await ComposerServiceStub(channel).PolishSong(request)).text

    _keep(output, _show(ask(gateway, call())))


@app.command()
def describe(
    audio: Annotated[Path, typer.Argument(help="a sound file: wav, flac, ogg or mp3")],
    seed: options.Seed = None,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Say what a sound file sounds like: caption, lyrics, metadata."""
    samples = read_audio(audio)
    setup = DescribeAudioSetup(frame_count=len(samples), sample_format=SAMPLE_FORMAT_F32, seed=seed)

    async def requests() -> AsyncIterator[DescribeAudioRequest]:
        yield DescribeAudioRequest(setup=setup)
        for chunk, _ in audio_chunks(samples, first_frame=0, sample_format=SAMPLE_FORMAT_F32):
            yield DescribeAudioRequest(audio=chunk)

    async def call() -> SongText:
        async with open_channel(gateway) as channel:
            return (await ComposerServiceStub(channel).DescribeAudio(requests())).text

    _show(ask(gateway, call()))


@app.command()
def score(
    request_file: Annotated[
        typer.FileText, typer.Argument(encoding="utf-8", help="a request in JSON with codes, as `plan -o` writes")
    ],
    spread: Annotated[
        float | None, typer.Option(parser=options.number(), help="0.01 to 1; the more, the closer to a half all scores")
    ] = None,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Say how well a plan's words fit its codes, part by part and in all."""
    song = read_request(request_file, hint="REQUEST_FILE")
    request = ScoreSongRequest(
        codes=song.codes,
        caption=song.caption,
        lyrics=INSTRUMENTAL if song.instrumental else song.lyrics,
        metadata=song.metadata,
        spread=spread,
    )

    async def call() -> Likelihood:
        async with open_channel(gateway) as channel:
            return (await ComposerServiceStub(channel).ScoreSong(request)).likelihood

    likelihood = ask(gateway, call())
    for part in likelihood.parts:
        print(f"{part.name}: {part.score:.4f}")
    print(f"total: {likelihood.total:.4f}")


def read_request(file: TextIO, *, hint: str) -> GenerateSongRequest:
    """Read a request in JSON; `hint` names the parameter that it came by."""
    try:
        text = file.read()
        if not text.lstrip().startswith("{"):
            raise typer.BadParameter("is no request in JSON: it must begin with {", param_hint=hint)
        return Parse(text, GenerateSongRequest())
    except (ParseError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"is no request in JSON: {error}", param_hint=hint) from error


def read_audio(path: Path) -> NDArray[np.float32]:
    """Read a sound file as 48 kHz stereo [frames, 2]; one channel is doubled, those beyond two are left out."""
    try:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise typer.BadParameter(f"is {str(path)!r}, which cannot be read: {error}", param_hint="AUDIO") from error
    stereo = np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else samples[:, :2]
    resampled = soxr.resample(stereo, rate_hz, SAMPLE_RATE_HZ) if rate_hz != SAMPLE_RATE_HZ else stereo
    return np.clip(resampled, -1, 1).astype(np.float32)


def write_text(output: Path, text: str) -> None:
    """Write the file that the option -o names."""
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"is {str(output)!r}, which cannot be written: {error}", param_hint="-o") from error


def ask(gateway: str, call: Coroutine[Any, Any, T]) -> T:
    """Await a call; an error ends the command with words."""
    try:
        return asyncio.run(call)
    except grpc.aio.AioRpcError as error:
        show_error(console, error, address=gateway)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _show(text: SongText) -> GenerateSongRequest:
    """Print a song in words, and make the request that asks for it."""
    metadata = json.loads(MessageToJson(text.metadata, preserving_proto_field_name=True))
    print(f"# Caption\n{text.caption}\n\n# Lyrics\n{text.lyrics}\n\n# Metadata")
    for name, value in metadata.items():
        print(f"{name}: {value}")
    if text.genres:
        print(f"genres: {text.genres}")
    is_instrumental = text.lyrics.strip() == INSTRUMENTAL
    return GenerateSongRequest(
        caption=text.caption,
        lyrics="" if is_instrumental else text.lyrics,
        instrumental=is_instrumental,
        metadata=text.metadata,
    )


def _keep(output: Path | None, request: GenerateSongRequest) -> None:
    if output is None:
        return
    write_text(output, MessageToJson(request, preserving_proto_field_name=True) + "\n")
    console.print(f"wrote {output}; `soundstage generate --request {output}` makes it", markup=False, highlight=False)
