"""align: when the lines of a finished song's lyrics are sung."""

from pathlib import Path
from typing import Annotated

import typer

from soundstage.music.v1.song_service_pb2 import AlignLyricsRequest, AlignLyricsResponse
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_cli import options
from soundstage_cli.channel import open_channel
from soundstage_cli.compose import ask, console, write_text
from soundstage_cli.output import keep_writable
from soundstage_cli.songs import SongName, Variant, check_variant, find_song

app = typer.Typer()


@app.command()
def align(
    song: SongName,
    variant: Variant = 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", callback=keep_writable, help="an .lrc file; else stdout")
    ] = None,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Write when each line of a song's lyrics is sung, as an LRC file."""

    async def call() -> AlignLyricsResponse:
        async with open_channel(gateway) as channel:
            songs = SongServiceStub(channel)
            found = await find_song(songs, song)
            check_variant(found, variant - 1)
            return await songs.AlignLyrics(AlignLyricsRequest(song=found.name, variant=variant - 1))

    aligned = ask(gateway, call())
    if output is None:
        print(aligned.lrc, end="")
    else:
        write_text(output, aligned.lrc)
    scores = f"{aligned.score:.0%}, what it was made of to {aligned.plan_score:.0%}"
    console.print(f"the song follows its lyrics to {scores}", highlight=False)
