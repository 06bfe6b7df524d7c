"""Make a song from here: one call, shown live, written as it comes."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, GenerateSongResponse
from soundstage_cli.sinks import Sink
from soundstage_cli.take import Take, record
from soundstage_cli.upload import upload
from soundstage_cli.view import SongView


async def send_files(
    target: str, request: GenerateSongRequest, source: Path | None, references: Sequence[Path]
) -> None:
    """Upload a request's files and write their names into it; raises grpc.aio.AioRpcError."""
    if source is not None:
        request.source = await upload(target, source)
    for path in references:
        request.references.append(await upload(target, path))


async def generate(console: Console, target: str, request: GenerateSongRequest, sinks: list[Sink]) -> Take:
    """Call the gateway at `target` and write every variant to its sink; raises grpc.aio.AioRpcError."""
    with SongView(console, variants=len(sinks)) as view:

        def take_event(event: GenerateSongResponse) -> None:
            view.show(event)
            if event.HasField("audio_header"):
                sinks[event.variant].begin(event.audio_header)
            elif event.HasField("audio_chunk"):
                sinks[event.variant].write(event.audio_chunk)

        try:
            return await record(target, request, on_event=take_event)
        finally:
            for sink in sinks:
                sink.close()
