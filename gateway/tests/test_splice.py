"""A splice keeps the source to the bit, and fades where it says."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from soundstage_gateway.audio_file import Samples
from soundstage_gateway.canvas import Canvas
from soundstage_gateway.splice import Splice


def noise(num_frames: int) -> Samples:
    return np.random.default_rng(0).uniform(-1, 1, (num_frames, 2)).astype(np.float32)


def test_the_window_is_new_the_fades_are_straight_and_the_rest_is_the_source() -> None:
    splice = Splice(canvas=Canvas(lead_frames=0, num_frames=12), start=5, end=7, fade_frames=3)
    shares = splice.apply(np.ones((12, 2), np.float32), np.zeros((12, 2), np.float32), 0)[:, 0]
    assert shares.tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_what_is_kept_has_the_sources_own_bits_whatever_was_made() -> None:
    source = np.full((8, 2), -0.0, np.float32)
    splice = Splice(canvas=Canvas(lead_frames=0, num_frames=8), start=6, end=8, fade_frames=1)
    kept = splice.apply(np.full((8, 2), np.float32(9)), source, 0)
    assert kept[:5].tobytes() == source[:5].tobytes()


@given(
    start=st.integers(0, 90),
    length=st.integers(1, 60),
    fade_frames=st.integers(0, 40),
    cuts=st.lists(st.integers(1, 99), max_size=5, unique=True),
)
def test_a_song_is_spliced_alike_however_it_is_cut(start: int, length: int, fade_frames: int, cuts: list[int]) -> None:
    source = noise(100)
    made = np.random.default_rng(1).uniform(-2, 2, (100, 2)).astype(np.float32)
    end = min(start + length, 100)
    splice = Splice(canvas=Canvas(lead_frames=0, num_frames=100), start=start, end=end, fade_frames=fade_frames)
    whole = splice.apply(made, source, 0)
    edges = [0, *sorted(cuts), 100]
    parts = [splice.apply(made[first:after], source, first) for first, after in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole[start:end], made[start:end])
    untouched = np.r_[0 : max(0, start - fade_frames), min(100, end + fade_frames) : 100]
    assert np.array_equal(whole[untouched], source[untouched])
    low, high = np.minimum(made, source) - 1e-6, np.maximum(made, source) + 1e-6
    assert ((low <= whole) & (whole <= high)).all()


@given(lead=st.integers(0, 9), tail=st.integers(0, 9), start=st.integers(0, 25), length=st.integers(0, 25))
def test_any_cut_of_a_canvas_is_that_of_the_padded_source(lead: int, tail: int, start: int, length: int) -> None:
    source = noise(7)
    canvas = Canvas(lead_frames=lead, num_frames=lead + 7 + tail)
    padded = np.pad(source, ((lead, tail), (0, 0)))
    end = min(start + length, len(padded))
    if start < end:
        assert np.array_equal(canvas.cut(source, start, end), padded[start:end])
    assert np.array_equal(np.concatenate(list(canvas.pieces(source, 4))), padded)
