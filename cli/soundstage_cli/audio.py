"""audio: a song that is kept, or a part of it, written in any format."""

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import grpc.aio
import typer

from soundstage.music.v1.song_service_pb2 import Song, StreamAudioRequest
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
from soundstage_cli.songs import SongName, Variant, check_variant, find_song
from soundstage_cli.view import SongView, show_error
from soundstage_runtime.score import DURATION_RANGE_S, SAMPLE_RATE_HZ

_IN_A_SONG: Final = options.number(0, DURATION_RANGE_S[1])

app = typer.Typer()

FromS = Annotated[float, typer.Option("--from-s", parser=_IN_A_SONG, help="begin so many seconds into the song")]
T = TypeVar("T")


@app.command()
def audio(
    song: SongName,
    output: OutputName = "song.wav",
    variant: Variant = 1,
    from_s: FromS = 0.0,
    to_s: Annotated[
        float | None, typer.Option("--to-s", parser=_IN_A_SONG, help="end so many seconds into the song")
    ] = None,
    peak: Annotated[
        float | None, typer.Option(parser=options.number(), help="scale the whole song to this peak, -60 to 0 dBFS")
    ] = None,
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
    span_s = from_s, to_s
    files = [] if output == "-" else [AudioFile(Path(output))]
    write_audio(gateway, output, _write(gateway, song, request, files, span_s, watch=watch), files)


async def _write(
    gateway: str,
    name: str,
    request: StreamAudioRequest,
    files: Sequence[AudioFile],
    span_s: tuple[float, float | None],
    *,
    watch: bool,
) -> None:
    async with open_channel(gateway) as channel:
        choose_part(request, await find_song(SongServiceStub(channel), name), *span_s)
        with ExitStack() as stack, SongView(console, variants=1) as view:
            sink = stack.enter_context(files[0]) if files else Pipe(sys.stdout.buffer)
            listener = Listener(channel, tell=view.tell)
            if watch:
                await listener.perform(request.song, {request.variant: (request, sink)}, show=view.show)
            else:
                await listener.play(request, sink, show=view.show)


def choose_part(request: StreamAudioRequest, song: Song, from_s: float, to_s: float | None = None) -> None:
    """Write a part of a song into a request, as audio frames of its own rate; raises BadParameter.

    Where a song ends is not known before it is denoised: the gateway refuses what lies beyond then.
    """
    request.song = song.name
    check_variant(song, request.variant)
    length_s = song.variants[request.variant].frame_count / SAMPLE_RATE_HZ or inf
    if from_s >= length_s:
        raise typer.BadParameter(f"is {from_s:g}; the song ends after {length_s:g} s", param_hint="--from-s")
    if to_s is not None and to_s > length_s:
        raise typer.BadParameter(f"is {to_s:g}; the song ends after {length_s:g} s", param_hint="--to-s")
    rate_hz = request.output.format.sample_rate_hz or SAMPLE_RATE_HZ
    request.first_frame = round(from_s * rate_hz)
    if to_s is not None:
        request.frame_count = max(1, round(to_s * rate_hz) - request.first_frame)


def write_audio(gateway: str, output: str, call: Coroutine[Any, Any, T], files: Sequence[AudioFile]) -> T:
    """Await a call that writes audio to `output`: `files`, or a pipe; an error ends the command with words."""
    try:
        return asyncio.run(call)
    except grpc.aio.AioRpcError as error:
        show_error(console, error, address=gateway)
        raise typer.Exit(1) from error
    except (OSError, StartOverError) as error:
        console.print(f"{output} cannot be written: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except (KeyboardInterrupt, asyncio.CancelledError):
        begun = ", ".join(str(file.path) for file in files if file.is_begun)
        console.print(
            "cancelled" + (f"; what came till then is in {begun}" if begun else ""), markup=False, highlight=False
        )
        raise typer.Exit(130) from None
