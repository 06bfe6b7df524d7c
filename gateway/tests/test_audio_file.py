"""Files become 48 kHz stereo samples, or are refused with what would do."""

import io
import struct

import numpy as np
import pytest

from soundstage.music.v1.song_service_pb2 import OutputOptions
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_S16
from soundstage_gateway.audio_encoder import open_encoder
from soundstage_gateway.audio_file import FileRefusedError, Recording, read_audio_file
from soundstage_gateway.audio_format import EXTENSIONS, read_output
from soundstage_runtime.pcm import to_bytes
from soundstage_runtime.validation import Checks

from . import bad_files
from .bad_files import FLAC, WAV
from .files import m4a, sound_file, tone, words


def read(data: bytes) -> Recording:
    return read_audio_file(io.BytesIO(data))


def complaint(data: bytes) -> str:
    with pytest.raises(FileRefusedError) as caught:
        read(data)
    return str(caught.value)


def loudness(samples: np.ndarray, frequency_hz: float) -> float:
    """The amplitude of one frequency in the middle of a signal [frames]."""
    middle = samples[len(samples) // 4 : 3 * len(samples) // 4]
    turns = np.exp(-2j * np.pi * frequency_hz * np.arange(len(middle)) / 48_000)
    return float(2 * abs(np.mean(middle * turns)))


@pytest.mark.parametrize(
    ("data", "rate_hz", "channels", "slack"),
    [
        (sound_file(tone(1, 44_100), 44_100, "MP3"), 44_100, 1, 0),
        (sound_file(tone(1, 48_000, 2), 48_000, "FLAC", "PCM_16"), 48_000, 2, 0),
        (sound_file(tone(1, 96_000, 2), 96_000, "FLAC", "PCM_24"), 96_000, 2, 0),
        (sound_file(tone(1, 8_000, 1), 8_000, "WAV", "PCM_U8"), 8_000, 1, 0),
        (sound_file(tone(1, 44_100, 6), 44_100, "WAV", "FLOAT"), 44_100, 6, 0),
        (sound_file(tone(1, 44_100, 2), 44_100, "WAV", "DOUBLE"), 44_100, 2, 0),
        (sound_file(tone(1, 44_100, 2), 44_100, "OGG", "VORBIS"), 44_100, 2, 140),  # its first block of 128 is dropped
        (sound_file(tone(1, 48_000, 2), 48_000, "OGG", "OPUS"), 48_000, 2, 0),
        (m4a(tone(1, 44_100, 2), 44_100), 44_100, 2, 0),
        (m4a(tone(1, 44_100, 2), 44_100, codec="aac"), 44_100, 2, 2 * 1024),  # whole blocks
    ],
    ids="mp3 flac flac24 u8 six-channels double vorbis opus alac aac".split(),
)
def test_files_of_all_kinds_become_the_tone_that_they_hold(
    data: bytes, rate_hz: int, channels: int, slack: int
) -> None:
    made = read(data)
    assert (made.sample_rate_hz, made.channels, made.is_silent) == (rate_hz, channels, False)
    assert made.samples.dtype == np.float32
    assert made.samples.shape[1] == 2
    assert abs(len(made.samples) - 48_000) <= slack
    for channel in made.samples.T:
        assert loudness(channel, 440) == pytest.approx(0.5, abs=0.03)
        assert loudness(channel, 5_000) < 0.005


@pytest.mark.parametrize(("file_format", "channels"), [("WAV", 2), ("FLAC", 2), ("WAV", 1), ("FLAC", 1)])
def test_16_bit_sources_at_48_khz_come_back_to_the_bit(file_format: str, channels: int) -> None:
    noise = words(48_000, channels)
    made = read(sound_file(noise, 48_000, file_format, "PCM_16"))
    assert to_bytes(made.samples, SAMPLE_FORMAT_S16) == np.repeat(noise, 2 // channels, axis=1).tobytes()


def test_of_many_channels_the_first_two_are_kept() -> None:
    noise = words(4800, 8)
    assert to_bytes(read(sound_file(noise, 48_000, "WAV")).samples, SAMPLE_FORMAT_S16) == noise[:, :2].tobytes()


def test_louder_samples_than_full_scale_are_clipped() -> None:
    made = read(sound_file(4 * tone(1, 48_000, 2), 48_000, "WAV", "FLOAT"))
    assert (made.samples.max(), made.samples.min()) == (1, np.float32(-32_768 / 32_767))


@pytest.mark.parametrize(("level", "is_silent"), [(0.0, True), (9e-7, True), (1.1e-6, False), (-1.1e-6, False)])
def test_silence_is_what_nobody_hears(level: float, is_silent: bool) -> None:
    assert read(sound_file(np.full((4800, 2), level, np.float32), 48_000, "WAV", "FLOAT")).is_silent is is_silent


@pytest.mark.parametrize("kind", bad_files.WHOLE)
@pytest.mark.parametrize("share", [0.003, 0.1, 0.5, 0.7])
def test_a_file_that_was_cut_is_refused(kind: str, share: float) -> None:
    whole = bad_files.WHOLE[kind]
    assert "send a whole" in complaint(whole[: round(share * len(whole))])


def test_a_wav_file_of_unknown_length_is_whole() -> None:
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        data = WAV[:40] + struct.pack("<I", size) + WAV[44:]
        assert read(data).samples.shape == (48_000, 2)


def test_an_mp3_file_that_tells_no_length_is_as_long_as_it_is() -> None:
    song = words(4 * 44_100)
    song[: 2 * 44_100] = 0  # takes so few bits that FFmpeg guesses at a longer file
    mp3 = sound_file(song, 44_100, "MP3")
    assert len(read(mp3.replace(b"Xing", b"None")).samples) == pytest.approx(4 * 48_000, abs=4 * 1152)


def test_a_cover_and_titles_in_any_encoding_do_no_harm() -> None:
    assert np.array_equal(read(bad_files.with_cover(FLAC)).samples, read(FLAC).samples)
    titled = FLAC.replace(b"reference libFLAC", b"r\xe9f\xe9rence libFLAC")
    assert titled != FLAC
    assert np.array_equal(read(titled).samples, read(FLAC).samples)


@pytest.mark.parametrize(
    ("data", "words_of_it"),
    [
        (b"hello" * 1000, "cannot be decoded"),
        (b"<!DOCTYPE html>" * 1000, "cannot be decoded"),
        (b"RIFF", "cannot be decoded"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "send a whole wav, flac, mp3, ogg or m4a file"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "send a whole wav, flac, mp3, ogg or m4a file"),
        (m4a(tone(1, 48_000, 2), 48_000, container="matroska", codec="flac"), "cannot be decoded"),
        (bad_files.video(), "holds no audio; send a wav, flac, mp3, ogg or m4a file"),
        (sound_file(tone(0.039, 48_000), 48_000, "WAV"), "is 0.039 s long; send at least 0.04 s"),
        (sound_file(words(4800, 9), 48_000, "WAV"), "has 9 channels; send a file of 1 to 8"),
        (sound_file(words(4800, 100), 48_000, "WAV"), "has 100 channels; send a file of 1 to 8"),
        (sound_file(tone(1, 7_999), 7_999, "WAV"), "has 7999 samples a second; send a file of 8000 to 384000"),
        (bad_files.with_rate(0), "cannot be decoded"),
        (bad_files.of_64_bits(), "has samples of the kind s64; send a file of 8 to 32 bits, or of floats"),
        (bad_files.with_rate(2_000_000_000), "has 2000000000 samples a second; send a file of 8000 to 384000"),
        (bad_files.with_rate(4_000_000_000), "cannot be decoded"),
        (sound_file(np.full((4800, 1), np.nan), 48_000, "WAV", "FLOAT"), "holds NaN or infinity"),
        (sound_file(np.full((4800, 1), np.inf), 48_000, "WAV", "FLOAT"), "holds NaN or infinity"),
        (bad_files.silence(3 * 3600), "is 10800 s long; send at most 600 s"),
        (bad_files.told_to_be(bad_files.silence(660), 0), "is longer than 600 s; cut it"),
        (bad_files.told_to_be(FLAC, 48_000 * 7200), "is 7200 s long; send at most 600 s"),
        (bad_files.told_to_be(FLAC, 48_000 * 2), "holds 1 s of the 2 s that it tells; send a whole file"),
        (bad_files.VAST_BOX, "holds no audio"),
        (bad_files.NESTED_BOXES, "cannot be decoded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_is_refused_with_what_would_do(data: bytes, words_of_it: str) -> None:
    assert words_of_it in complaint(data)


def test_ten_minutes_are_not_too_long() -> None:
    assert read(sound_file(np.zeros((600 * 8_000, 1), np.int16), 8_000, "FLAC")).samples.shape == (28_800_000, 2)


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3", "ogg", "m4a"])
def test_what_the_gateway_streams_is_a_whole_file(extension: str) -> None:
    checks = Checks()
    output = read_output(checks, OutputOptions(format=EXTENSIONS[extension]), can_normalise=False)
    checks.finish()
    encoder = open_encoder(output.format)
    data = b"".join(piece.data for piece in encoder.encode(tone(2, 48_000, 2)) + encoder.finish())
    assert len(read(data).samples) == pytest.approx(96_000, abs=2 * 1152)
