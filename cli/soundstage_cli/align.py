"""align: when the lines of a finished song's lyrics are sung."""

from pathlib import Path
from typing import Annotated

import typer

from soundstage.music.v1.song_service_pb2 import AlignLyricsRequest, AlignLyricsResponse
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_cli import options
from soundstage_cli.channel import open_channel
from soundstage_cli.compose import ask, console, write_text

app = typer.Typer()


@app.command()
def align(
    song: Annotated[str, typer.Argument(help="the song's name, as `generate` shows it: songs/…")],
    variant: Annotated[int, typer.Option(min=1, max=8, help="which of its variants, from 1")] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="an .lrc file; else stdout")] = None,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Write when each line of a song's lyrics is sung, as an LRC file."""
    options.check_words("SONG", song)
    request = AlignLyricsRequest(song=song, variant=variant - 1)

    async def call() -> AlignLyricsResponse:
        async with open_channel(gateway) as channel:
            return await SongServiceStub(channel).AlignLyrics(request)

    aligned = ask(gateway, call())
    if output is None:
        print(aligned.lrc, end="")
    else:
        write_text(output, aligned.lrc)
    console.print(f"the song follows its lyrics to {aligned.score:.0%}", highlight=False)
