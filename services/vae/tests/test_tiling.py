from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage_vae.tiling import DECODE_CONTEXT, ENCODE_CONTEXT, Tile, plan_tiles, touching, window_lengths

frames = st.integers(1, 15_000)
contexts = st.sampled_from([DECODE_CONTEXT, ENCODE_CONTEXT])
windows = st.builds(window_lengths, st.integers(32, 200), st.integers(32, 2048))


@given(st.integers(32, 200), st.integers(32, 2048))
def test_windows_double_up_to_the_largest(first: int, largest: int) -> None:
    lengths = window_lengths(first, largest)
    assert (lengths[0], lengths[-1]) == (min(first, largest), largest)
    assert all(length == 2 * before for before, length in pairwise(lengths[:-1]))
    assert all(before < length <= 2 * before for before, length in pairwise(lengths))


@given(frames, windows, contexts)
def test_cores_follow_each_other_from_end_to_end(num_frames: int, windows: tuple[int, ...], context: int) -> None:
    tiles = plan_tiles(num_frames, windows=windows, context=context)
    assert [tile.core_start for tile in tiles] == [0, *(tile.core_stop for tile in tiles[:-1])]
    assert tiles[-1].core_stop == num_frames
    assert all(tile.core_start < tile.core_stop for tile in tiles)


@given(frames, windows, contexts)
def test_every_window_has_a_planned_length_and_lies_in_the_song(
    num_frames: int, windows: tuple[int, ...], context: int
) -> None:
    for index, tile in enumerate(plan_tiles(num_frames, windows=windows, context=context)):
        grown = windows[: index + 1]
        length = tile.window_stop - tile.window_start
        assert length in [min(planned, num_frames) for planned in grown]
        assert tile.window_start >= 0
        assert tile.window_stop <= num_frames
        # Only what reaches the end, or would go behind the window before, keeps a window from growing.
        assert length == grown[-1] or tile.window_stop + grown[-1] > num_frames


@given(frames, windows, contexts)
def test_the_last_window_is_no_longer_than_it_must_be(num_frames: int, windows: tuple[int, ...], context: int) -> None:
    tiles = plan_tiles(num_frames, windows=windows, context=context)
    last = tiles[-1]
    needed = num_frames - max(0, last.core_start - context)
    assert not [length for length in windows[: len(tiles)] if needed <= length < last.window_stop - last.window_start]


@given(frames, windows, contexts)
def test_cores_have_all_their_context_except_at_the_songs_ends(
    num_frames: int, windows: tuple[int, ...], context: int
) -> None:
    for tile in plan_tiles(num_frames, windows=windows, context=context):
        assert tile.window_start <= max(0, tile.core_start - context)
        assert tile.window_stop >= min(num_frames, tile.core_stop + context)


@given(frames, windows, contexts)
def test_windows_never_go_back(num_frames: int, windows: tuple[int, ...], context: int) -> None:
    starts = [tile.window_start for tile in plan_tiles(num_frames, windows=windows, context=context)]
    assert starts == sorted(starts)


@given(frames, windows, contexts, st.data())
def test_the_tiles_of_a_range_keep_just_the_range(
    num_frames: int, windows: tuple[int, ...], context: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, num_frames * 1920 - 1))
    wanted = range(first, data.draw(st.integers(first + 1, num_frames * 1920)))
    kept: list[int] = []
    for tile in touching(plan_tiles(num_frames, windows=windows, context=context), wanted):
        keep = tile.keep(wanted)
        assert keep.start < keep.stop
        kept += [tile.core_start * 1920 + keep.start, tile.core_start * 1920 + keep.stop]
    assert (kept[0], kept[-1]) == (wanted.start, wanted.stop)
    assert kept[1:-1:2] == kept[2::2]


def test_shifts_the_last_window_back_instead_of_shrinking_it() -> None:
    assert plan_tiles(200, windows=(128,), context=9) == [
        Tile(window_start=0, window_stop=128, core_start=0, core_stop=119),
        Tile(window_start=72, window_stop=200, core_start=119, core_stop=200),
    ]


def test_first_tiles_are_small_and_later_ones_large() -> None:
    tiles = plan_tiles(300, windows=(32, 64, 128), context=9)
    assert [(tile.window_start, tile.window_stop) for tile in tiles] == [
        (0, 32),
        (14, 78),
        (60, 188),
        (170, 298),
        (268, 300),
    ]
    assert [tile.core_stop for tile in tiles] == [23, 69, 179, 289, 300]


@pytest.mark.parametrize("num_frames", [1, 9, 127, 128])
def test_a_song_no_longer_than_a_window_is_one_tile(num_frames: int) -> None:
    whole = Tile(window_start=0, window_stop=num_frames, core_start=0, core_stop=num_frames)
    assert plan_tiles(num_frames, windows=(128,), context=9) == [whole]
