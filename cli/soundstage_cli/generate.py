"""Make a song from here: shown live, written as it comes."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, GenerateSongResponse, StreamAudioRequest
from soundstage_cli.channel import open_channel
from soundstage_cli.listener import Listener
from soundstage_cli.sinks import Sink
from soundstage_cli.take import Take
from soundstage_cli.upload import SentFile, upload
from soundstage_cli.view import SongView


async def send_files(
    target: str, request: GenerateSongRequest, source: Path | None, references: Sequence[Path]
) -> dict[str, SentFile]:
    """Upload a request's files, write their names into it and return whose they are; raises grpc.aio.AioRpcError."""
    sent: dict[str, SentFile] = {}
    if source is not None:
        request.source = await upload(target, "--source", source)
        sent[request.source] = "--source", source
    for path in references:
        request.references.append(await upload(target, "--reference", path))
        sent[request.references[-1]] = "--reference", path
    return sent


async def generate(console: Console, target: str, request: GenerateSongRequest, sinks: Sequence[Sink]) -> Take:
    """Have the gateway at `target` make a song, and write every variant to its sink as request.output says.

    The song is cancelled with the caller. Raises grpc.aio.AioRpcError, and what the sinks raise.
    """
    take, started_s = Take(), time.monotonic()
    async with open_channel(target) as channel:
        with SongView(console, variants=len(sinks)) as view:

            def show(event: GenerateSongResponse) -> None:
                view.show(event)
                take.note(event, time.monotonic() - started_s)

            listener = Listener(channel, tell=view.tell)
            async with listener.making(request) as song:
                parts = {
                    variant: (StreamAudioRequest(song=song.name, variant=variant, output=request.output), sink)
                    for variant, sink in enumerate(sinks)
                }
                await listener.perform(song.name, parts, show=show)
    return take
