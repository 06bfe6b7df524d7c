"""Output options are filled in whole, or refused with what would do."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.music.v1.song_service_pb2 import OutputOptions
from soundstage.type.v1.audio_pb2 import (
    ENCODING_FLAC,
    ENCODING_MP3,
    ENCODING_MP4_AAC,
    ENCODING_MP4_OPUS,
    ENCODING_OGG_OPUS,
    ENCODING_PCM,
    ENCODING_WAV,
    ENCODING_WEBM_OPUS,
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_S24,
    AudioFormat,
)
from soundstage_gateway.audio_encoder import open_encoder
from soundstage_gateway.audio_format import Output, media_type, read_output
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.validation import Checks


def read(options: OutputOptions, *, can_normalise: bool = True) -> Output:
    checks = Checks()
    output = read_output(checks, options, can_normalise=can_normalise)
    checks.finish()
    return output


def complaints(options: OutputOptions, *, can_normalise: bool = True) -> dict[str, str]:
    with pytest.raises(InvalidRequestError) as caught:
        read(options, can_normalise=can_normalise)
    return {violation.field: violation.description for violation in caught.value.violations}


def test_everything_has_a_default() -> None:
    assert read(OutputOptions()) == Output(
        format=AudioFormat(
            encoding=ENCODING_PCM, sample_format=SAMPLE_FORMAT_S16, sample_rate_hz=48_000, channels=2, bit_rate_bps=0
        ),
        gain_db=0,
        peak_dbfs=None,
        fade_in_s=0,
        fade_out_s=0,
        max_buffer_s=None,
    )


def test_what_is_asked_is_kept() -> None:
    asked = AudioFormat(encoding=ENCODING_FLAC, sample_format=SAMPLE_FORMAT_S24, sample_rate_hz=44_100, channels=1)
    options = OutputOptions(format=asked, gain_db=-60, peak_dbfs=0, fade_in_s=60, fade_out_s=0.25, max_buffer_s=0.5)
    assert read(options) == Output(
        format=asked, gain_db=-60, peak_dbfs=0, fade_in_s=60, fade_out_s=0.25, max_buffer_s=0.5
    )


@pytest.mark.parametrize(
    ("fields", "bit_rate_bps"),
    [
        ({"encoding": ENCODING_MP3}, 192_000),
        ({"encoding": ENCODING_MP3, "sample_rate_hz": 24_000}, 160_000),
        ({"encoding": ENCODING_MP4_AAC}, 192_000),
        ({"encoding": ENCODING_MP4_AAC, "sample_rate_hz": 24_000, "channels": 1}, 144_000),
        ({"encoding": ENCODING_OGG_OPUS}, 128_000),
        ({"encoding": ENCODING_WEBM_OPUS, "bit_rate_bps": 32_000}, 32_000),
        ({"encoding": ENCODING_MP4_OPUS, "bit_rate_bps": 320_000}, 320_000),
        ({"encoding": ENCODING_WAV}, 0),
    ],
)
def test_a_lossy_format_has_a_bit_rate_that_its_codec_can_keep(fields: dict[str, Any], bit_rate_bps: int) -> None:
    assert read(OutputOptions(format=AudioFormat(**fields))).format.bit_rate_bps == bit_rate_bps


FORMAT_COMPLAINTS: list[tuple[dict[str, Any], str, str]] = [
    (
        {"encoding": 9},
        "encoding",
        "is 9; must be one of ENCODING_PCM, ENCODING_WAV, ENCODING_FLAC, ENCODING_MP3, ENCODING_OGG_OPUS, "
        "ENCODING_WEBM_OPUS, ENCODING_MP4_AAC, ENCODING_MP4_OPUS",
    ),
    ({"sample_rate_hz": 96_000}, "sample_rate_hz", "is 96000; PCM takes one of 48000, 44100, 24000"),
    (
        {"encoding": ENCODING_OGG_OPUS, "sample_rate_hz": 44_100},
        "sample_rate_hz",
        "is 44100; OGG_OPUS takes one of 48000, 24000",
    ),
    ({"channels": 3}, "channels", "is 3; must be 1 or 2"),
    (
        {"sample_format": 9},
        "sample_format",
        "is 9; PCM takes one of SAMPLE_FORMAT_S16, SAMPLE_FORMAT_S24, SAMPLE_FORMAT_F32",
    ),
    (
        {"encoding": ENCODING_FLAC, "sample_format": SAMPLE_FORMAT_F32},
        "sample_format",
        "is SAMPLE_FORMAT_F32; FLAC takes one of SAMPLE_FORMAT_S16, SAMPLE_FORMAT_S24",
    ),
    (
        {"encoding": ENCODING_MP3, "sample_format": SAMPLE_FORMAT_S16},
        "sample_format",
        "is SAMPLE_FORMAT_S16; leave it out, as MP3 has none",
    ),
    ({"encoding": ENCODING_WAV, "bit_rate_bps": 1}, "bit_rate_bps", "is 1; leave it out, as WAV has none"),
    ({"encoding": ENCODING_MP3, "bit_rate_bps": 31_999}, "bit_rate_bps", "is 31999; must be 32000 to 320000"),
    (
        {"encoding": ENCODING_MP3, "bit_rate_bps": 160_001, "sample_rate_hz": 24_000},
        "bit_rate_bps",
        "is 160001; must be 32000 to 160000",
    ),
    (
        {"encoding": ENCODING_OGG_OPUS, "bit_rate_bps": 256_001, "channels": 1},
        "bit_rate_bps",
        "is 256001; must be 32000 to 256000",
    ),
]


@pytest.mark.parametrize(("fields", "field", "complaint"), FORMAT_COMPLAINTS)
def test_a_format_that_cannot_be_is_refused(fields: dict[str, Any], field: str, complaint: str) -> None:
    assert complaints(OutputOptions(format=AudioFormat(**fields))) == {f"output.format.{field}": complaint}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"gain_db": float("nan")}, "is nan; must be -60 to 20"),
        ({"gain_db": 20.1}, "is 20.1; must be -60 to 20"),
        ({"peak_dbfs": 0.1}, "is 0.1; must be -60 to 0"),
        ({"fade_in_s": -0.1}, "is -0.1; must be 0 to 60"),
        ({"fade_out_s": float("inf")}, "is inf; must be 0 to 60"),
        ({"max_buffer_s": 0.0}, "is 0; must be 0.5 to 600"),
    ],
)
def test_a_number_out_of_its_range_is_refused(fields: dict[str, Any], complaint: str) -> None:
    [name] = fields
    assert complaints(OutputOptions(**fields)) == {f"output.{name}": complaint}


def test_a_peak_is_taken_only_where_it_can_be_known() -> None:
    wanted = OutputOptions(peak_dbfs=0)
    assert read(wanted).peak_dbfs == 0
    complaint = "is set before the song's peak is known; leave it to StreamAudio"
    assert complaints(wanted, can_normalise=False) == {"output.peak_dbfs": complaint}


def test_all_that_is_bad_is_told_at_once() -> None:
    bad = AudioFormat(
        encoding=ENCODING_MP3, sample_format=SAMPLE_FORMAT_S16, sample_rate_hz=1, channels=7, bit_rate_bps=1
    )
    fields = {"format.sample_format", "format.sample_rate_hz", "format.channels", "format.bit_rate_bps"}
    names = fields | {"gain_db", "peak_dbfs", "fade_in_s", "fade_out_s", "max_buffer_s"}
    options = OutputOptions(format=bad, gain_db=99, peak_dbfs=9, fade_in_s=99, fade_out_s=99, max_buffer_s=0)
    assert complaints(options).keys() == {f"output.{name}" for name in names}


@given(
    encoding=st.integers(0, 8),
    sample_format=st.integers(0, 3),
    sample_rate_hz=st.sampled_from([0, 48_000, 44_100, 24_000]),
    channels=st.integers(0, 2),
    bit_rate_bps=st.one_of(st.just(0), st.integers(32_000, 320_000)),
)
def test_every_format_that_is_taken_can_be_written(**fields: int) -> None:
    try:
        found = read(OutputOptions(format=AudioFormat(**fields))).format  # pyright: ignore[reportArgumentType]
    except InvalidRequestError:
        return
    assert read(OutputOptions(format=found)).format == found
    encoder = open_encoder(found)
    pieces = encoder.encode(np.zeros((4_800, found.channels), np.float32)) + encoder.finish()
    assert sum(piece.frame_count for piece in pieces) == 4_800


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "audio/L16; rate=48000; channels=2; endianness=little-endian"),
        (
            {"sample_format": SAMPLE_FORMAT_S24, "sample_rate_hz": 44_100, "channels": 1},
            "audio/L24; rate=44100; channels=1; endianness=little-endian",
        ),
        ({"sample_format": SAMPLE_FORMAT_F32}, "audio/x-F32; rate=48000; channels=2; endianness=little-endian"),
        ({"encoding": ENCODING_WAV}, "audio/wav"),
        ({"encoding": ENCODING_FLAC}, "audio/flac"),
        ({"encoding": ENCODING_MP3}, "audio/mpeg"),
        ({"encoding": ENCODING_OGG_OPUS}, "audio/ogg; codecs=opus"),
        ({"encoding": ENCODING_WEBM_OPUS}, "audio/webm; codecs=opus"),
        ({"encoding": ENCODING_MP4_AAC}, "audio/mp4; codecs=mp4a.40.2"),
        ({"encoding": ENCODING_MP4_OPUS}, "audio/mp4; codecs=opus"),
    ],
)
def test_a_media_type_says_what_a_player_must_know(fields: dict[str, Any], name: str) -> None:
    assert media_type(read(OutputOptions(format=AudioFormat(**fields))).format) == name
