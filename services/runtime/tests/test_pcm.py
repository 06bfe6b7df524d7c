import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from soundstage.type.v1.audio_pb2 import (
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_S24,
    SAMPLE_FORMAT_UNSPECIFIED,
)
from soundstage_runtime.pcm import audio_chunks, frame_size_bytes, from_bytes, to_bytes

stereo = np_st.array_shapes(min_dims=1, max_dims=1, max_side=50).map(lambda shape: (*shape, 2))
finite = st.floats(-4, 4, width=32)


@given(np_st.arrays(np.float32, stereo, elements=finite))
def test_f32_keeps_every_bit(samples: np.ndarray) -> None:
    assert np.array_equal(from_bytes(to_bytes(samples, SAMPLE_FORMAT_F32), SAMPLE_FORMAT_F32), samples)


@given(np_st.arrays(np.float32, stereo, elements=finite))
def test_s16_is_within_half_a_step_of_the_clipped_sample(samples: np.ndarray) -> None:
    back = from_bytes(to_bytes(samples, SAMPLE_FORMAT_S16), SAMPLE_FORMAT_S16)
    # Half a step, and one float32 rounding of the product with 32767.
    assert np.abs(back - np.clip(samples, -32768 / 32767, 1)).max() <= 0.5 / 32767 + 1e-7


@given(np_st.arrays(np.dtype("<i2"), stereo))
def test_s16_survives_a_round_trip(words: np.ndarray) -> None:
    assert to_bytes(from_bytes(words.tobytes(), SAMPLE_FORMAT_S16), SAMPLE_FORMAT_S16) == words.tobytes()


@pytest.mark.parametrize(
    ("sample", "word"),
    [(0.0, 0), (1.0, 32767), (-1.0, -32767), (1.5, 32767), (-9.0, -32768), (0.5 / 32767, 0), (1.5 / 32767, 2)],
)
def test_s16_clips_at_the_ends_of_its_range_and_rounds_half_to_even(sample: float, word: int) -> None:
    written = to_bytes(np.full((1, 2), sample, np.float32), SAMPLE_FORMAT_S16)
    assert np.frombuffer(written, "<i2").tolist() == [word, word]


@given(np_st.arrays(np.uint8, stereo.map(lambda shape: (shape[0], 6))))
def test_s24_survives_a_round_trip(octets: np.ndarray) -> None:
    data = octets.tobytes()
    assert to_bytes(from_bytes(data, SAMPLE_FORMAT_S24), SAMPLE_FORMAT_S24) == data


@pytest.mark.parametrize(
    ("sample", "word"),
    [
        (1.0, 8_388_607),
        (-1.0, -8_388_607),
        (1.5, 8_388_607),
        (-9.0, -8_388_608),
        (2.0**-24, 0),  # 0.49999994 of a step
        (0.5, 4_194_304),  # 4194303.5, half way to the odd word below
        (1 - 2.0**-24, 8_388_607),  # 8388606.50000006; as a float32 product 8388606.5, half way to the even word below
        (0.75 + 2.0**-24, 6_291_456),  # 6291455.75
    ],
)
def test_s24_clips_at_the_ends_of_its_range_and_rounds_half_to_even(sample: float, word: int) -> None:
    written = to_bytes(np.full((1, 2), sample, np.float32), SAMPLE_FORMAT_S24)
    assert [int.from_bytes(written[at : at + 3], "little", signed=True) for at in (0, 3)] == [word, word]


def test_a_frame_takes_what_is_written_of_it() -> None:
    for sample_format in (SAMPLE_FORMAT_S16, SAMPLE_FORMAT_S24, SAMPLE_FORMAT_F32):
        assert len(to_bytes(np.zeros((1, 2), np.float32), sample_format)) == frame_size_bytes(sample_format)


def test_an_unspecified_format_is_s16() -> None:
    samples = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
    assert to_bytes(samples, SAMPLE_FORMAT_UNSPECIFIED) == to_bytes(samples, SAMPLE_FORMAT_S16)


def test_cuts_chunks_of_half_a_second_that_leave_no_gap() -> None:
    samples = np.arange(100_000, dtype=np.float32).reshape(50_000, 2)
    chunks = [chunk for chunk, _ in audio_chunks(samples, first_frame=7, sample_format=SAMPLE_FORMAT_F32)]
    assert [(chunk.first_frame, chunk.frame_count) for chunk in chunks] == [
        (7, 24_000),
        (24_007, 24_000),
        (48_007, 2_000),
    ]
    assert b"".join(chunk.data for chunk in chunks) == samples.tobytes()


def test_a_chunks_peak_is_measured_before_clipping() -> None:
    samples = np.zeros((30_000, 2), np.float32)
    samples[24_500, 1] = -1.75
    peaks = [peak for _, peak in audio_chunks(samples, first_frame=0, sample_format=SAMPLE_FORMAT_S16)]
    assert peaks == [0.0, 1.75]
