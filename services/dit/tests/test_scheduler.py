"""Turns and room: no song starves another, and how long one waits follows from what is before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage_dit.schedule import schedule
from soundstage_dit.scheduler import Load, Room, charge, take_turn, tokens_until_room, total_tokens
from soundstage_dit.song import Diffusion, Edit, Guidance, Sampler, Song, Task, TextToMusic


@dataclass(eq=False)
class Endless:
    """A song that always wants the same."""

    tokens: int
    used: int = 0
    steps: int = 0
    model: str = ""


def run(songs: Sequence[Endless], steps: int, *, max_songs: int = 8, max_tokens: int = 7500) -> None:
    """Take steps as the engine does."""
    for _ in range(steps):
        for song in take_turn(songs, max_songs=max_songs, max_tokens=max_tokens):
            song.used += charge(song.tokens)
            song.steps += 1


def test_what_fits_goes_in_one_step() -> None:
    eight = [Endless(375) for _ in range(8)]
    assert take_turn(eight, max_songs=8, max_tokens=7500) == eight
    assert len(take_turn([*eight, Endless(375)], max_songs=8, max_tokens=7500)) == 8
    assert len(take_turn(eight, max_songs=8, max_tokens=1000)) == 2
    assert take_turn([Endless(7500)], max_songs=8, max_tokens=1000)


def test_a_ten_minute_song_and_short_ones_get_the_same_share() -> None:
    long, short = Endless(7500), [Endless(375) for _ in range(3)]
    run([long, *short], 2000)
    for song in short:
        assert abs(song.used - long.used) <= charge(long.tokens)
    assert long.steps > 100


def test_a_ten_minute_song_goes_on_though_others_keep_coming() -> None:
    # Tiny ones too, which would let others of middling size go before it if what fits could go first.
    long = Endless(7500)
    songs = [long, Endless(5), Endless(375), Endless(1500), Endless(1500)]
    for _ in range(600):
        run(songs, 1)
        for index, song in enumerate(songs):
            if song.steps == 8 and song is not long:  # it is done, and another comes
                songs[index] = Endless(song.tokens, used=min(other.used for other in songs))
    assert long.steps >= 15


@given(
    claims=st.lists(st.tuples(st.integers(1, 9000), st.integers(0, 20_000)), min_size=1, max_size=9),
    max_songs=st.integers(1, 8),
    max_tokens=st.integers(1, 9000),
)
def test_no_song_waits_longer_than_others_take_to_catch_up(
    claims: list[tuple[int, int]], max_songs: int, max_tokens: int
) -> None:
    songs = [Endless(tokens, used) for tokens, used in claims]
    for watched in songs:
        ahead = [other for other in songs if other is not watched and other.used <= watched.used]
        patience = sum((watched.used - other.used) // charge(other.tokens) + 1 for other in ahead)
        copies = {id(song): Endless(song.tokens, song.used) for song in songs}
        run(list(copies.values()), patience + 1, max_songs=max_songs, max_tokens=max_tokens)
        assert copies[id(watched)].steps >= 1


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=9), st.integers(1, 8), st.integers(1, 9000))
def test_a_step_keeps_to_its_bounds(tokens: list[int], max_songs: int, max_tokens: int) -> None:
    chosen = take_turn([Endless(each) for each in tokens], max_songs=max_songs, max_tokens=max_tokens)
    assert 1 <= len(chosen) <= max_songs
    assert len(chosen) == 1 or sum(song.tokens for song in chosen) <= max_tokens


def load(tokens: float, size_bytes: int = 1) -> Load:
    return Load(tokens_left=tokens, size_bytes=size_bytes)


@pytest.mark.parametrize(
    ("held", "before", "size_bytes", "wanted"),
    [
        ([100], [], 1, 0.0),  # there is room
        ([100, 300], [], 1, 200.0),  # both share the device until the first is done
        ([100, 300], [50], 1, 300.0),  # and then so do the second and the one before
        ([100, 300], [], 10, 400.0),  # both must have left
    ],
)
def test_a_wait_is_what_is_computed_until_there_is_room(
    held: list[int], before: list[int], size_bytes: int, wanted: float
) -> None:
    room = Room(max_songs=2, max_bytes=10)
    found = tokens_until_room(room, [load(each) for each in held], [load(each) for each in before], load(9, size_bytes))
    assert found == wanted


def test_tokens_count_every_velocity() -> None:
    def tokens(diffusion: Diffusion, task: Task = TextToMusic()) -> int:  # noqa: B008 - it is frozen
        return total_tokens(Song(caption="", lyrics="", num_frames=5, seed=0, diffusion=diffusion, task=task))

    times, guidance = tuple(schedule(4, 3.0)), Guidance(scale=2.0)
    edit = Edit(source_caption="", source_lyrics="", averages=3)
    assert tokens(Diffusion(times=times)) == 4 * 3
    assert tokens(Diffusion(times=times, guidance=guidance)) == 2 * 4 * 3
    assert tokens(Diffusion(times=times, sampler=Sampler.HEUN)) == 2 * 4 * 3
    assert tokens(Diffusion(times=times), task=edit) == 6 * 4 * 3
