"""The demo: tiny models, four processes, one song, a picture of its time."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import grpc.aio
import soundfile
from rich.console import Console

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.type.v1.audio_pb2 import ENCODING_WAV
from soundstage_cli.generate import generate
from soundstage_cli.models import Models, find_models
from soundstage_cli.sinks import AudioFile
from soundstage_cli.stack import Stack
from soundstage_cli.view import show_error, show_timeline
from soundstage_runtime.score import CHANNELS, SAMPLE_RATE_HZ

_DURATION_S: Final = 20
_DECODE_SHARE_MAX: Final = 0.4
_LYRICS: Final = (
    "[verse]\nFour little processes, each with its part\n[chorus]\nOne plans, one paints, one plays from the start\n"
)


class DemoFailedError(Exception):
    """The demo did not show what it is there to show."""


def run_demo(console: Console, *, output: Path, models: Path) -> None:
    """Make the models if need be, bring the processes up, make a song, check it; raises DemoFailedError."""
    try:
        prepare_models(models, lambda line: console.print(line, highlight=False))
    except OSError as error:
        raise DemoFailedError(f"--models is {str(models)!r}, which cannot be written: {error}") from error
    asyncio.run(_run(console, find_models(models / "original"), output))


def prepare_models(models: Path, tell: Callable[[str], None]) -> None:
    """Write tiny random checkpoints, whole or not at all, if there are none."""
    if models.exists():
        return
    unfinished = models.with_name(models.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    from soundstage_cli.tiny.checkpoints import write_tiny

    tell(f"writing tiny random checkpoints to {models} (they make noise, not music)")
    write_tiny(unfinished)
    unfinished.rename(models)


async def _run(console: Console, models: Models, output: Path) -> None:
    stack = Stack(models, on_change=lambda member: console.print(f"  {member.name} {member.state}", highlight=False))
    try:
        await stack.start()
        await _make_song(console, stack.target, output)
    finally:
        await stack.stop()


async def _make_song(console: Console, target: str, output: Path) -> None:
    request = GenerateSongRequest(caption="a bright synth pop tune with a busy bass", lyrics=_LYRICS, seeds=[7])
    request.metadata.duration_s = _DURATION_S
    request.output.format.encoding = ENCODING_WAV
    try:
        with AudioFile(output) as file:
            take = await generate(console, target, request, [file])
    except grpc.aio.AioRpcError as error:
        show_error(console, error, address=target)
        raise DemoFailedError("the song was not made") from error
    show_timeline(console, take)
    made = soundfile.info(output)
    found = (made.samplerate, made.channels, made.frames)
    console.print(f"{output}: {found[0]} Hz, {found[1]} channels, {found[2] / found[0]:g} s", highlight=False)
    if found != (SAMPLE_RATE_HZ, CHANNELS, _DURATION_S * SAMPLE_RATE_HZ):
        raise DemoFailedError(f"{output} should be {SAMPLE_RATE_HZ} Hz, {CHANNELS} channels, {_DURATION_S} s")
    if take.timelines[0].decode_share >= _DECODE_SHARE_MAX:
        console.print(
            f"the first audio came later than {_DECODE_SHARE_MAX:.0%} into the decoding: is this machine busy?",
            style="yellow",
        )
