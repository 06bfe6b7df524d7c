"""Mastering is exact at every frame, however the song is cut and wherever it begins."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from soundstage.type.v1.audio_pb2 import ENCODING_PCM, SAMPLE_FORMAT_F32, AudioFormat
from soundstage_gateway.audio_format import Output
from soundstage_gateway.mastering import Mastering

from .files import tone

Floats = NDArray[np.float32]


def output(
    rate_hz: int = 48_000,
    channels: int = 2,
    *,
    gain_db: float = 0,
    peak_dbfs: float | None = None,
    fade_in_s: float = 0,
    fade_out_s: float = 0,
) -> Output:
    return Output(
        format=AudioFormat(
            encoding=ENCODING_PCM, sample_format=SAMPLE_FORMAT_F32, sample_rate_hz=rate_hz, channels=channels
        ),
        gain_db=gain_db,
        peak_dbfs=peak_dbfs,
        fade_in_s=fade_in_s,
        fade_out_s=fade_out_s,
        max_buffer_s=None,
    )


def noise(num_frames: int) -> Floats:
    return np.random.default_rng(0).uniform(-1, 1, (num_frames, 2)).astype(np.float32)


def master(wanted: Output, song: Floats, *, cuts: list[int] | None = None, peak: float | None = None) -> Floats:
    mastering = Mastering(wanted, song_frames=len(song), peak=peak)
    edges = [0, *sorted(cuts or []), len(song)]
    parts = [mastering.feed(song[start:end], last=end == edges[-1]) for start, end in pairwise(edges)]
    mastered = np.concatenate(parts)
    assert mastered.shape == (mastering.num_frames, wanted.format.channels)
    return mastered


def test_a_plain_output_keeps_every_bit() -> None:
    song = np.array([[-0.0, 1e-40], [3.5, -1.0]], np.float32)
    assert master(output(), song).tobytes() == song.tobytes()


@given(
    rate_hz=st.sampled_from([48_000, 44_100, 24_000]),
    channels=st.sampled_from([1, 2]),
    num_frames=st.integers(1, 20_000),
    data=st.data(),
)
def test_the_same_bits_come_out_however_the_song_is_cut(
    rate_hz: int, channels: int, num_frames: int, data: st.DataObject
) -> None:
    wanted = output(rate_hz, channels, gain_db=-1, fade_in_s=0.1, fade_out_s=0.2)
    song = noise(num_frames)
    cuts = data.draw(st.lists(st.integers(0, num_frames - 1), max_size=6))
    assert np.array_equal(master(wanted, song, cuts=cuts), master(wanted, song))


@given(start=st.integers(0, 9_999), channels=st.sampled_from([1, 2]))
def test_at_48_khz_a_stream_may_begin_anywhere(start: int, channels: int) -> None:
    wanted = output(channels=channels, gain_db=2, fade_in_s=0.1, fade_out_s=0.15)
    song = noise(10_000)
    resumed = Mastering(wanted, song_frames=len(song), peak=None, start_frame=start).feed(song[start:], last=True)
    assert np.array_equal(resumed, master(wanted, song)[start:])


@pytest.mark.parametrize(
    ("rate_hz", "num_frames", "mastered_frames"),
    [(48_000, 7, 7), (44_100, 480_000, 441_000), (44_100, 100, 92), (24_000, 3, 2), (24_000, 2, 1), (24_000, 1, 1)],
)
def test_lengths_are_rounded_halves_up(rate_hz: int, num_frames: int, mastered_frames: int) -> None:
    assert len(master(output(rate_hz), noise(num_frames))) == mastered_frames


@pytest.mark.parametrize("rate_hz", [44_100, 24_000])
def test_a_resampled_tone_is_the_tone_at_its_own_rate_and_place(rate_hz: int) -> None:
    mastered = master(output(rate_hz), tone(2, 48_000, 2, frequency_hz=1_000))
    # At the ends the resampler hears silence beside the tone.
    middle = slice(2_000, -2_000)
    assert np.abs(mastered - tone(2, rate_hz, 2, frequency_hz=1_000))[middle].max() < 1e-5


@pytest.mark.parametrize("rate_hz", [44_100, 24_000])
def test_a_level_stays_and_what_the_rate_cannot_hold_goes(rate_hz: int) -> None:
    assert np.abs(master(output(rate_hz), np.full((48_000, 2), 0.5, np.float32)) - 0.5)[2_000:-2_000].max() < 1e-6
    too_high = master(output(rate_hz), tone(1, 48_000, 2, frequency_hz=rate_hz / 2 + 600))
    assert np.abs(too_high)[2_000:-2_000].max() < 1e-5


def test_one_channel_is_the_mean_of_both() -> None:
    song = np.array([[0.5, 0.25], [1, -1], [-0.75, 0]], np.float32)
    assert master(output(channels=1), song).tolist() == [[0.375], [0], [-0.375]]


def test_fades_are_straight_from_silence_and_to_it() -> None:
    mastered = master(output(fade_in_s=4 / 48_000, fade_out_s=2 / 48_000), np.ones((8, 2), np.float32))
    assert mastered[:, 1].tolist() == [0, 0.25, 0.5, 0.75, 1, 1, 0.5, 0]


def test_fades_longer_than_the_song_meet() -> None:
    mastered = master(output(fade_in_s=8 / 48_000, fade_out_s=8 / 48_000), np.ones((5, 2), np.float32))
    assert (64 * mastered[:, 0]).tolist() == [0, 3, 4, 3, 0]


def test_a_gain_is_in_decibels() -> None:
    mastered = master(output(gain_db=20), np.full((1, 2), 0.125, np.float32))
    assert mastered.tolist() == [[1.25, 1.25]]


def test_the_peak_is_moved_to_where_it_is_wanted_before_the_gain() -> None:
    song = np.array([[0.05, -0.2], [0.1, 0]], np.float32)
    mastered = master(output(peak_dbfs=-20, gain_db=-20), song, peak=0.2)
    assert mastered == pytest.approx(song / 0.2 * 0.01, rel=1e-6)


def test_silence_stays_silence_whatever_peak_is_wanted() -> None:
    assert not master(output(peak_dbfs=-1), np.zeros((4, 2), np.float32), peak=0.0).any()
