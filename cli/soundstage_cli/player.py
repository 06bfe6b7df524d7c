"""Programs that play audio from a pipe."""

import asyncio
import shutil
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import dataclass
from typing import Final

from soundstage.type.v1.audio_pb2 import ENCODING_PCM, ENCODING_WAV, AudioChunk, AudioHeader, Encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """A program, and what it takes through its stdin: WAV, or PCM in S16 at 48000 Hz in stereo."""

    name: str
    arguments: tuple[str, ...]
    encoding: Encoding.ValueType = ENCODING_WAV


PLAYERS: Final = {
    player.name: player
    for player in (
        Player(name="ffplay", arguments=("-nodisp", "-autoexit", "-loglevel", "error", "-i", "pipe:0")),
        Player(name="mpv", arguments=("--no-video", "--no-terminal", "--no-config", "-")),
        Player(name="aplay", arguments=("-q", "-")),
        Player(
            name="paplay",
            arguments=("--raw", "--format=s16le", "--rate=48000", "--channels=2"),
            encoding=ENCODING_PCM,
        ),
    )
}


class PlayerMissingError(Exception):
    """There is no such player on this machine; the message says what would do."""


class PlayerEndedError(Exception):
    """The player failed, or ended before the song did; the message tells how."""


def find_player(name: str | None = None) -> Player:
    """Return the player of a name, or the first that is on the PATH; raises PlayerMissingError."""
    for player in PLAYERS.values() if name is None else filter(None, [PLAYERS.get(name)]):
        if shutil.which(player.name):
            return player
    known = ", ".join(PLAYERS)
    if name is None:
        raise PlayerMissingError(f"none of {known} is installed; install ffmpeg or mpv, or write a file: -o of `audio`")
    if name not in PLAYERS:
        raise PlayerMissingError(f"is {name!r}; must be one of {known}")
    raise PlayerMissingError(f"is {name}, which is not installed; install it, or choose another of {known}")


class PlayerPipe:
    """Plays what it is given, from the first chunk on: a sink, and a context manager that waits for the music's end.

    When its block fails, the player is ended at once.
    """

    def __init__(self, player: Player) -> None:
        self._player = player
        self._process: Process | None = None

    async def __aenter__(self) -> "PlayerPipe":
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            if kind is None:
                await self._process.wait()
                if self._process.returncode:
                    raise PlayerEndedError(self._how())
        finally:
            if self._process.returncode is None:
                self._process.terminate()
                await self._process.wait()

    async def begin(self, header: AudioHeader) -> None:
        """Start the player."""
        command = (self._player.name, *self._player.arguments)
        self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=DEVNULL)

    async def write(self, chunk: AudioChunk) -> None:
        """Wait until the player has room for a chunk; raises PlayerEndedError."""
        assert self._process is not None, "a chunk came before its header"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(chunk.data)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            await self._process.wait()
            raise PlayerEndedError(f"{self._how()}, before the song did") from None

    def _how(self) -> str:
        assert self._process is not None
        return f"{self._player.name} ended with exit status {self._process.returncode}"
