"""audio: a song that is kept, or a part of it, written in any format."""

import asyncio
import sys
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TypeVar

import grpc.aio
import typer

from soundstage.music.v1.song_service_pb2 import StreamAudioRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_cli import options
from soundstage_cli.channel import open_channel
from soundstage_cli.compose import console
from soundstage_cli.listener import Listener
from soundstage_cli.output import (
    BitRate,
    EncodingName,
    FadeIn,
    FadeOut,
    Gain,
    Mono,
    OutputName,
    SampleFormatName,
    SampleRate,
    read_output,
)
from soundstage_cli.sinks import AudioFile, Pipe, StartOverError
from soundstage_cli.songs import SongName, find_song
from soundstage_cli.view import SongView, show_error
from soundstage_runtime.score import SAMPLE_RATE_HZ

app = typer.Typer()

Variant = Annotated[int, typer.Option(min=1, max=8, help="which of its variants, from 1")]
FromS = Annotated[float, typer.Option("--from-s", min=0, help="begin so many seconds into the song")]
T = TypeVar("T")


@app.command()
def audio(
    song: SongName,
    output: OutputName = "song.wav",
    variant: Variant = 1,
    from_s: FromS = 0.0,
    to_s: Annotated[float | None, typer.Option("--to-s", help="end so many seconds into the song")] = None,
    peak: Annotated[float | None, typer.Option(help="scale the whole song to this peak, -60 to 0 dBFS")] = None,
    encoding: EncodingName = None,
    sample_format: SampleFormatName = None,
    sample_rate: SampleRate = None,
    mono: Mono = False,
    bit_rate: BitRate = None,
    gain: Gain = 0.0,
    fade_in: FadeIn = 0.0,
    fade_out: FadeOut = 0.0,
    watch: Annotated[bool, typer.Option("--watch", help="show how the song is made, while it is")] = False,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Write a song, or a part of it, as soon as it can be heard."""
    if to_s is not None and to_s <= from_s:
        raise typer.BadParameter(f"is {to_s:g}; must be more than --from-s, {from_s:g}", param_hint="--to-s")
    request = StreamAudioRequest(variant=variant - 1)
    request.output.CopyFrom(
        read_output(
            output,
            encoding=encoding,
            sample_format=sample_format,
            sample_rate=sample_rate,
            mono=mono,
            bit_rate=bit_rate,
            gain=gain,
            fade_in=fade_in,
            fade_out=fade_out,
        )
    )
    if peak is not None:
        request.output.peak_dbfs = peak
    set_range(request, from_s, to_s)
    write_audio(gateway, output, _write(gateway, song, request, output, watch=watch))


async def _write(gateway: str, name: str, request: StreamAudioRequest, output: str, *, watch: bool) -> None:
    async with open_channel(gateway) as channel:
        request.song = (await find_song(SongServiceStub(channel), name)).name
        with ExitStack() as files, SongView(console, variants=1) as view:
            sink = Pipe(sys.stdout.buffer) if output == "-" else files.enter_context(AudioFile(Path(output)))
            listener = Listener(channel, tell=view.tell)
            if watch:
                await listener.perform(request.song, {request.variant: (request, sink)}, show=view.show)
            else:
                await listener.play(request, sink, show=view.show)


def set_range(request: StreamAudioRequest, from_s: float, to_s: float | None = None) -> None:
    """Write seconds into a request as audio frames of its own rate."""
    rate_hz = request.output.format.sample_rate_hz or SAMPLE_RATE_HZ
    request.first_frame = round(from_s * rate_hz)
    if to_s is not None:
        request.frame_count = max(1, round(to_s * rate_hz) - request.first_frame)


def write_audio(gateway: str, output: str, call: Coroutine[Any, Any, T]) -> T:
    """Await a call that writes audio to `output`; an error ends the command with words."""
    try:
        return asyncio.run(call)
    except grpc.aio.AioRpcError as error:
        show_error(console, error, address=gateway)
        raise typer.Exit(1) from error
    except (OSError, StartOverError) as error:
        console.print(f"{output} cannot be written: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("cancelled; what was decoded till then is kept")
        raise typer.Exit(130) from None
