"""play: hear a song, one that is kept or a new one, from its first chunk on."""

import asyncio
from contextlib import AsyncExitStack
from typing import Annotated

import typer

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, StreamAudioRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_cli import options
from soundstage_cli.audio import FromS, choose_part
from soundstage_cli.channel import open_channel
from soundstage_cli.compose import ask, console
from soundstage_cli.listener import Listener
from soundstage_cli.player import PLAYERS, Player, PlayerEndedError, PlayerMissingError, PlayerPipe, find_player
from soundstage_cli.songs import Variant, find_song
from soundstage_cli.view import SongView

_AHEAD_S = 10.0  # sent ahead of what is heard: that long a connection may be lost unheard

app = typer.Typer()


@app.command()
def play(
    song: Annotated[str | None, typer.Argument(help="a song's name, or how its id begins")] = None,
    caption: Annotated[str | None, typer.Option("--caption", "-c", help="make a new song, like this")] = None,
    lyrics_file: options.LyricsFile = None,
    duration: options.Duration = None,
    seed: options.Seed = None,
    instrumental: options.Instrumental = False,
    variant: Variant = 1,
    from_s: FromS = 0.0,
    player: Annotated[str | None, typer.Option(help=f"{', '.join(PLAYERS)}; else the first that is there")] = None,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """Play a song, or make one and play it while it is being decoded. Ctrl-C ends both."""
    if (song is None) == (caption is None):
        raise typer.BadParameter("give the name of a song, or -c and what a new one is like", param_hint="SONG")
    try:
        chosen = find_player(player)
    except PlayerMissingError as error:
        raise typer.BadParameter(str(error), param_hint="--player") from error
    wanted = None
    if caption is not None:
        options.check_words("--caption", caption)
        wanted = GenerateSongRequest(
            caption=caption,
            lyrics=options.read_lyrics(lyrics_file),
            instrumental=instrumental,
            metadata=options.read_metadata(duration=duration),
            seeds=[] if seed is None else [seed],
        )
    request = StreamAudioRequest(variant=variant - 1)
    request.output.format.encoding = chosen.encoding
    request.output.max_buffer_s = _AHEAD_S
    try:
        ask(gateway, _play(gateway, song or "", wanted, request, from_s, chosen))
    except PlayerEndedError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    except asyncio.CancelledError:
        raise typer.Exit(130) from None


async def _play(
    gateway: str,
    name: str,
    wanted: GenerateSongRequest | None,
    request: StreamAudioRequest,
    from_s: float,
    player: Player,
) -> None:
    async with open_channel(gateway) as channel, AsyncExitStack() as stack:
        view = stack.enter_context(SongView(console, variants=1))
        listener = Listener(channel, tell=view.tell)
        if wanted is None:
            made = await find_song(SongServiceStub(channel), name)
        else:
            made = await stack.enter_async_context(listener.making(wanted))
        choose_part(request, made, from_s)
        pipe = await stack.enter_async_context(PlayerPipe(player))
        await listener.perform(made.name, {request.variant: (request, pipe)}, show=view.show)
