"""songs: the songs that the gateway keeps."""

import time
from collections.abc import AsyncGenerator, Iterator
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Final

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_LM,
    STAGE_VAE,
    CancelSongRequest,
    DeleteSongRequest,
    GetSongRequest,
    ListSongsRequest,
    Song,
    SongState,
    SongVariant,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_cli import options
from soundstage_cli.channel import open_channel
from soundstage_cli.compose import ask, console
from soundstage_runtime.score import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from soundstage.music.v1.song_service_pb2_grpc import SongServiceAsyncStub

app = typer.Typer(help="The songs that the gateway keeps.")

PREFIX: Final = "songs/"
SongName = Annotated[str, typer.Argument(help="the song's name, or how its id begins: `soundstage songs` shows it")]
Variant = Annotated[int, typer.Option(parser=options.whole(1, 8), help="which of its variants, from 1")]

_ID_CHARACTERS: Final = 32
_SHOWN_CHARACTERS: Final = 8
_CAPTION_CHARACTERS: Final = 60
_PAGE_SIZE: Final = 100
_COLOURS: Final = {"running": "yellow", "completed": "green", "failed": "red"}
_UNITS_S: Final = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
_STAGES: Final = {STAGE_LM: "plan", STAGE_DIT: "diffuse", STAGE_VAE: "hear"}


@app.callback(invoke_without_command=True)
def songs(
    context: typer.Context,
    limit: Annotated[int, typer.Option(parser=options.whole(1), help="show at most so many, the newest first")] = 50,
    gateway: options.Gateway = options.GATEWAY,
) -> None:
    """List the songs that the gateway keeps."""
    context.default_map = {name: {"gateway": gateway} for name in ("show", "cancel", "delete")}
    if context.invoked_subcommand is not None:
        return

    async def call() -> list[Song]:
        async with open_channel(gateway) as channel:
            return [song async for song in list_songs(SongServiceStub(channel), limit=limit)]

    Console().print(make_table(ask(gateway, call()), now_s=time.time()))


@app.command()
def show(name: SongName, gateway: options.Gateway = options.GATEWAY) -> None:
    """Tell all that is known of a song."""

    async def call() -> Song:
        async with open_channel(gateway) as channel:
            return await find_song(SongServiceStub(channel), name)

    for line in describe(ask(gateway, call()), now_s=time.time()):
        print(line)


@app.command()
def cancel(name: SongName, gateway: options.Gateway = options.GATEWAY) -> None:
    """Stop a song that is being made."""

    async def call() -> Song:
        async with open_channel(gateway) as channel:
            stub = SongServiceStub(channel)
            song = await find_song(stub, name)
            return (await stub.CancelSong(CancelSongRequest(song=song.name))).song

    song = ask(gateway, call())
    console.print(f"{song.name} is {name_state(song)}", highlight=False)


@app.command()
def delete(name: SongName, gateway: options.Gateway = options.GATEWAY) -> None:
    """Stop a song, if it is being made, and forget it."""

    async def call() -> Song:
        async with open_channel(gateway) as channel:
            stub = SongServiceStub(channel)
            song = await find_song(stub, name)
            await stub.DeleteSong(DeleteSongRequest(song=song.name))
            return song

    console.print(f"{ask(gateway, call()).name} is deleted", highlight=False)


async def find_song(stub: "SongServiceAsyncStub", name: str) -> Song:
    """Return the song whose id begins as `name` does; raises BadParameter, grpc.aio.AioRpcError."""
    options.check_words("SONG", name)
    beginning = name.removeprefix(PREFIX)
    if len(beginning) >= _ID_CHARACTERS:
        return (await stub.GetSong(GetSongRequest(song=PREFIX + beginning))).song
    if not beginning:
        raise typer.BadParameter("is empty; give a song's name, or how it begins", param_hint="SONG")
    found = [song async for song in list_songs(stub) if song.name.startswith(PREFIX + beginning)]
    if len(found) != 1:
        which = f"begins {len(found)} songs; give more of its name" if found else "begins no song that is kept"
        raise typer.BadParameter(f"is {name!r}, which {which}: see `soundstage songs`", param_hint="SONG")
    return found[0]


def check_variant(song: Song, index: int) -> None:
    """Refuse a variant, counted from 0, that a song does not have."""
    if index >= len(song.variants):
        has = f"has variants 1 to {len(song.variants)}" if len(song.variants) > 1 else "has one variant"
        raise typer.BadParameter(f"is {index + 1}; the song {has}", param_hint="--variant")


async def list_songs(stub: "SongServiceAsyncStub", *, limit: int | None = None) -> AsyncGenerator[Song, None]:
    """Yield songs, the newest first; raises grpc.aio.AioRpcError."""
    token, num_left = "", limit
    while num_left is None or num_left > 0:
        size = min(_PAGE_SIZE, num_left or _PAGE_SIZE)
        page = await stub.ListSongs(ListSongsRequest(page_size=size, page_token=token))
        for song in page.songs:
            yield song
        token = page.next_page_token
        if not token:
            break
        num_left = None if num_left is None else num_left - len(page.songs)


def make_table(songs: list[Song], *, now_s: float) -> Table:
    """Lay songs out, one a line."""
    table = Table(box=None)
    for heading in ("song", "state", "length", "made", "expires"):
        table.add_column(heading, no_wrap=True)
    table.add_column("caption")  # the one that is folded where the terminal is narrow
    for song in songs:
        state = name_state(song)
        table.add_row(
            song.name.removeprefix(PREFIX)[:_SHOWN_CHARACTERS],
            Text(state, style=_COLOURS.get(state, "white")),
            ", ".join(filter(None, map(tell_length, song.variants))),
            f"{tell_span(now_s - _seconds(song.create_time))} ago",
            f"in {tell_span(_seconds(song.expire_time) - now_s)}",
            Text(shorten(song.request.caption, _CAPTION_CHARACTERS, placeholder="…")),
        )
    return table


def describe(song: Song, *, now_s: float) -> Iterator[str]:
    """Yield what is known of a song, line by line."""
    yield f"song: {song.name}"
    yield f"state: {name_state(song)}"
    yield f"made: {tell_span(now_s - _seconds(song.create_time))} ago"
    yield f"expires: in {tell_span(_seconds(song.expire_time) - now_s)}"
    yield f"caption: {song.request.caption}"
    for number, variant in enumerate(song.variants, 1):
        plan = variant.plan.metadata
        facts = [
            f"seed {variant.seed}",
            tell_length(variant),
            f"{plan.bpm} bpm" if plan.HasField("bpm") else "",
            plan.key_scale,
            *(f"{_STAGES[timing.stage]} {timing.duration_s:.2f} s" for timing in variant.timings),
        ]
        yield f"variant {number}: {', '.join(filter(None, facts))}"
    if song.HasField("error"):
        yield f"error: {song.error.message}"


def name_state(song: Song) -> str:
    """Name how far a song is, in a word."""
    return SongState.Name(song.state).removeprefix("SONG_STATE_").lower()


def tell_length(variant: SongVariant) -> str:
    """Write a variant's length as minutes and seconds; nothing while it is not known."""
    minutes, seconds = divmod(round(variant.frame_count / SAMPLE_RATE_HZ), 60)
    return f"{minutes}:{seconds:02}" if variant.frame_count else ""


def tell_span(span_s: float) -> str:
    """Write a time in its largest whole unit."""
    unit, size_s = next(((unit, size_s) for unit, size_s in _UNITS_S if span_s >= size_s), _UNITS_S[-1])
    return f"{max(0, int(span_s / size_s))} {unit}"


def _seconds(timestamp: Timestamp) -> float:
    return timestamp.ToNanoseconds() / 1e9
