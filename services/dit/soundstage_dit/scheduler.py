"""Whose turn it is on the device, and who may hold memory on it: numbers in, numbers out."""

import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, TypeVar

from soundstage_dit.song import Edit, Sampler, Song

FRAMES_PER_TOKEN: Final = 2
_STEP_TOKENS: Final = 256


class Taker(Protocol):
    """A song with work to do."""

    @property
    def tokens(self) -> int:
        """What its next evaluation takes."""
        ...

    @property
    def used(self) -> int:
        """What its steps so far were charged."""
        ...

    @property
    def model(self) -> object:
        """What its steps are taken with; others of the same may share them."""
        ...


T = TypeVar("T", bound=Taker)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a song still asks of the device, how much of its memory it holds, and its model's parts, in bytes each.

    What only visits, to look at a song that was made, is no song.
    """

    tokens_left: float
    size_bytes: int
    parts: Mapping[int, int] = field(default_factory=dict[int, int])
    is_song: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What songs may hold of the device at once, and what the models may that they are made with."""

    max_songs: int
    max_bytes: int
    max_model_bytes: float = math.inf

    def fits(self, held: Sequence[Load], newcomer: Load) -> bool:
        """Say whether there is room for one more beside those that hold some."""
        loads = [*held, newcomer]
        return (
            sum(load.is_song for load in loads) <= self.max_songs
            and sum(load.size_bytes for load in loads) <= self.max_bytes
            and sum(ChainMap(*(dict(load.parts) for load in loads)).values()) <= self.max_model_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """A song waits for room: so many wait before it, and it is likely to take so long; 0 s where nothing is known."""

    position: int
    wait_s: float


def count_tokens(frames: int) -> int:
    """Count what one velocity of so many frames takes."""
    return -(-frames // FRAMES_PER_TOKEN)


def total_tokens(song: Song) -> int:
    """Count what all of a song's velocities take, at most."""
    draws = song.task.averages if isinstance(song.task, Edit) else 1
    looks = 2 if song.diffusion.sampler is Sampler.HEUN else 1
    return song.diffusion.steps * draws * looks * evaluation_tokens(song)


def evaluation_tokens(song: Song) -> int:
    """Count what the velocities take that a song asks for at once, at most; a step may ask several times."""
    sides = 2 if isinstance(song.task, Edit) else 1
    return sides * (2 if song.diffusion.guidance.scale > 1 else 1) * count_tokens(song.num_frames)


def charge(tokens: int) -> int:
    """Return what a step costs a song that takes so many tokens in it: all weights are read even for one."""
    return tokens + _STEP_TOKENS


def take_turn(songs: Sequence[T], *, max_songs: int, max_tokens: float) -> list[T]:
    """Choose the songs of a step: least used first, as many as fit; of equals, the first in `songs`.

    The least used one always goes, though it may be too much by itself, and with it songs of its own model. None of
    these goes before one that has had less, though it would fit: else small ones could keep a large one waiting for
    ever.
    """
    chosen: list[T] = []
    tokens_left = max_tokens
    by_use = sorted(songs, key=lambda song: song.used)
    for song in [song for song in by_use if song.model == by_use[0].model][:max_songs]:
        if chosen and song.tokens > tokens_left:
            break
        chosen.append(song)
        tokens_left -= song.tokens
    return chosen


def tokens_until_room(room: Room, held: Sequence[Load], before: Sequence[Load], song: Load) -> float:
    """Estimate what the device computes until a song has room, if all that hold some share it evenly.

    `before` are those that wait before it. Each of them must fit by itself.
    """
    held, tokens = list(held), 0.0
    for newcomer in (*before, song):
        while not room.fits(held, newcomer):
            shortest = min(other.tokens_left for other in held)
            tokens += shortest * len(held)
            held = [replace(one, tokens_left=one.tokens_left - shortest) for one in held if one.tokens_left > shortest]
        held.append(newcomer)
    return tokens
