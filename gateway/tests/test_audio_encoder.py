"""What encoders write can be played as far as they say, in its place, and to the bit where nothing may be lost."""

import gc
import io
import resource
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
import soundfile
import soxr
from av.audio.frame import AudioFrame
from numpy.typing import NDArray

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
    Encoding,
    SampleFormat,
)
from soundstage_gateway.audio_encoder import Piece, open_encoder
from soundstage_gateway.audio_format import LOSSLESS, OPUS, read_output
from soundstage_runtime.pcm import to_bytes
from soundstage_runtime.validation import Checks

Floats = NDArray[np.float32]
LONGEST_CODEC_FRAME = 1152
CODECS = {
    ENCODING_WAV: ("wav", "pcm"),
    ENCODING_FLAC: ("flac", "flac"),
    ENCODING_MP3: ("mp3", "mp3float"),
    ENCODING_OGG_OPUS: ("ogg", "opus"),
    ENCODING_WEBM_OPUS: ("matroska,webm", "opus"),
    ENCODING_MP4_AAC: ("mov,mp4,m4a,3gp,3g2,mj2", "aac"),
    ENCODING_MP4_OPUS: ("mov,mp4,m4a,3gp,3g2,mj2", "opus"),
}
SOUNDFILE_KINDS: dict[int, Literal["int16", "int32", "float32"]] = {
    SAMPLE_FORMAT_S16: "int16",
    SAMPLE_FORMAT_S24: "int32",
    SAMPLE_FORMAT_F32: "float32",
}


def complete(**fields: Any) -> AudioFormat:
    checks = Checks()
    output = read_output(checks, OutputOptions(format=AudioFormat(**fields)), can_normalise=False)
    checks.finish()
    return output.format


def name(audio_format: AudioFormat) -> str:
    encoding = Encoding.Name(audio_format.encoding).removeprefix("ENCODING_")
    sample_format = SampleFormat.Name(audio_format.sample_format).removeprefix("SAMPLE_FORMAT_")
    suffix = f"-{sample_format}" if audio_format.sample_format else ""
    return f"{encoding}-{audio_format.sample_rate_hz}-{audio_format.channels}{suffix}"


FORMATS = [
    complete(encoding=encoding, sample_rate_hz=rate_hz, channels=channels)
    for encoding in CODECS
    for rate_hz in (48_000, 44_100, 24_000)
    for channels in (2, 1)
    if encoding != ENCODING_WAV and not (encoding in OPUS and rate_hz == 44_100)
]
LOSSY = [audio_format for audio_format in FORMATS if audio_format.encoding not in LOSSLESS]


def music(audio_format: AudioFormat, duration_s: float, *, seed: int = 0) -> Floats:
    """Chords that swell under a beat of noise, unlike in both channels."""
    random = np.random.default_rng(seed)
    times_s = np.arange(round(duration_s * audio_format.sample_rate_hz))[:, None] / audio_format.sample_rate_hz
    song = 0.15 * random.standard_normal(times_s.shape) * np.exp(-30 * (4 * times_s % 1))
    for pitch_hz in (110, 220, 329.6, 440, 554.4, 880, 1320, 2637):
        phases = random.uniform(0, 2 * np.pi, audio_format.channels)
        swell = 0.06 + 0.04 * np.sin(2 * np.pi * random.uniform(0.5, 3) * times_s)
        song = song + swell * np.sin(2 * np.pi * pitch_hz * times_s + phases)
    return song.astype(np.float32)


def encode(audio_format: AudioFormat, song: Floats, *, run_frames: int = 10_007) -> list[Piece]:
    encoder = open_encoder(audio_format)
    runs = [song[start : start + run_frames] for start in range(0, len(song), run_frames)]
    return [piece for run in runs for piece in encoder.encode(run)] + encoder.finish()


def joined(pieces: list[Piece]) -> bytes:
    return b"".join(piece.data for piece in pieces)


def decode(data: bytes, audio_format: AudioFormat) -> Floats:
    """Decode to [frames, channels] at the format's rate; FFmpeg gives all Opus at 48 kHz."""
    with av.open(io.BytesIO(data), "r") as container:
        kind = (container.format.name, container.streams.audio[0].codec.name.partition("_")[0])
        assert kind == CODECS[audio_format.encoding]
        frames = list(container.decode(audio=0))
    assert {len(frame.layout.channels) for frame in frames} == {audio_format.channels}
    samples = np.concatenate([_by_frame(frame) for frame in frames])
    [rate_hz] = {frame.sample_rate for frame in frames}
    if rate_hz == audio_format.sample_rate_hz:
        return samples
    assert audio_format.encoding in OPUS
    return soxr.resample(samples, rate_hz, audio_format.sample_rate_hz, quality="VHQ")


def _by_frame(frame: AudioFrame) -> NDArray[Any]:
    words = frame.to_ndarray()
    return words.T if frame.format.is_planar else words.reshape(-1, len(frame.layout.channels))


def lag(heard: Floats, song: Floats) -> int:
    """Return how many frames later than in the song things are heard, at most 40."""
    middle = song[40:-40, 0]
    return max(range(-40, 41), key=lambda frames: float(middle @ heard[40 + frames : 40 + frames + len(middle), 0]))


def signal_to_noise_db(heard: Floats, song: Floats) -> float:
    return float(10 * np.log10(np.square(song).sum() / np.square(heard - song).sum()))


@pytest.mark.parametrize("audio_format", FORMATS, ids=name)
def test_a_decoder_has_the_frames_that_the_pieces_so_far_promise(audio_format: AudioFormat) -> None:
    song = music(audio_format, 2.01)
    delay_frames = open_encoder(audio_format).delay_frames
    pieces = encode(audio_format, song)
    promised = np.cumsum([piece.frame_count for piece in pieces])
    assert promised[-1] == len(song)
    for last in np.random.default_rng(1).permutation(len(pieces) - 1)[:5]:
        if promised[last] > 0:
            assert len(decode(joined(pieces[: last + 1]), audio_format)) - delay_frames == promised[last]
    rest = len(decode(joined(pieces), audio_format)) - delay_frames - len(song)
    assert 0 <= rest < LONGEST_CODEC_FRAME


@pytest.mark.parametrize("audio_format", FORMATS, ids=name)
def test_little_more_than_half_a_second_is_held_back(audio_format: AudioFormat) -> None:
    encoder = open_encoder(audio_format)
    silence = np.zeros((4_800, audio_format.channels), np.float32)
    held_frames = fed_frames = 0
    for _ in range(20):
        fed_frames += len(silence)
        held_frames += len(silence) - sum(piece.frame_count for piece in encoder.encode(silence))
        assert held_frames <= 0.5 * audio_format.sample_rate_hz + 3 * LONGEST_CODEC_FRAME
    assert fed_frames > 2 * held_frames


@pytest.mark.parametrize("audio_format", LOSSY, ids=name)
def test_what_a_lossy_encoding_keeps_is_in_its_place(audio_format: AudioFormat) -> None:
    song = music(audio_format, 2)
    heard = decode(joined(encode(audio_format, song)), audio_format)[open_encoder(audio_format).delay_frames :]
    assert lag(heard, song) == 0
    assert signal_to_noise_db(heard[: len(song)], song) > 18


@pytest.mark.parametrize("audio_format", LOSSY[::2], ids=name)
def test_two_streams_that_meet_leave_no_gap_and_repeat_nothing(audio_format: AudioFormat) -> None:
    song = music(audio_format, 2)
    meeting = len(song) // 2 + 123
    streams = [song[:meeting], song[meeting:]]
    delay_frames = open_encoder(audio_format).delay_frames
    heard = np.concatenate(
        [decode(joined(encode(audio_format, part)), audio_format)[delay_frames:][: len(part)] for part in streams]
    )
    assert len(heard) == len(song)
    around = slice(meeting - LONGEST_CODEC_FRAME, meeting + LONGEST_CODEC_FRAME)
    assert lag(heard[around], song[around]) == 0
    assert signal_to_noise_db(heard[around], song[around]) > 9


@pytest.mark.parametrize("encoding", [ENCODING_MP3, ENCODING_MP4_AAC, *sorted(OPUS)], ids=Encoding.Name)
@pytest.mark.parametrize("bit_rate_bps", [32_000, 160_000])
def test_a_bit_rate_is_kept_but_for_what_the_container_takes(encoding: Encoding.ValueType, bit_rate_bps: int) -> None:
    audio_format = complete(encoding=encoding, bit_rate_bps=bit_rate_bps)
    sizes_bytes = [len(piece.data) for piece in encode(audio_format, music(audio_format, 4))]
    assert 8 * sum(sizes_bytes) / 4 == pytest.approx(bit_rate_bps, rel=0.1, abs=10_000)


def words(num_frames: int, channels: int) -> Floats:
    """Every kind of sample: noise from silence to beyond full scale, and what lies half way between two words."""
    noise = np.random.default_rng(2).uniform(-1.1, 1.1, (num_frames, channels)).astype(np.float32)
    noise[: num_frames // 2] *= np.linspace(0, 1, num_frames // 2, dtype=np.float32)[:, None]
    noise[:4] = [[0.5 / 32_767], [1.5 / 32_767], [-1], [1]]
    return noise


LOSSLESS_FORMATS = [
    complete(encoding=encoding, sample_format=sample_format, sample_rate_hz=rate_hz, channels=channels)
    for encoding, sample_format in [
        (ENCODING_WAV, SAMPLE_FORMAT_S16),
        (ENCODING_WAV, SAMPLE_FORMAT_S24),
        (ENCODING_WAV, SAMPLE_FORMAT_F32),
        (ENCODING_FLAC, SAMPLE_FORMAT_S16),
        (ENCODING_FLAC, SAMPLE_FORMAT_S24),
    ]
    for rate_hz, channels in [(48_000, 2), (44_100, 1), (24_000, 2)]
]


@pytest.mark.parametrize("audio_format", LOSSLESS_FORMATS, ids=name)
def test_lossless_encodings_keep_every_bit(audio_format: AudioFormat) -> None:
    song = words(20_011, audio_format.channels)
    decoded = decode(joined(encode(audio_format, song)), audio_format)
    assert as_bytes(decoded, audio_format) == to_bytes(song, audio_format.sample_format)


@pytest.mark.parametrize("audio_format", [f for f in LOSSLESS_FORMATS if f.encoding == ENCODING_WAV], ids=name)
def test_other_readers_find_the_same_in_a_wav_file(audio_format: AudioFormat) -> None:
    song = words(20_011, audio_format.channels)
    with soundfile.SoundFile(io.BytesIO(joined(encode(audio_format, song)))) as file:
        assert file.samplerate == audio_format.sample_rate_hz
        assert file.format == ("WAVEX" if audio_format.sample_format == SAMPLE_FORMAT_S24 else "WAV")
        read = file.read(dtype=SOUNDFILE_KINDS[audio_format.sample_format], always_2d=True)
    assert as_bytes(read, audio_format) == to_bytes(song, audio_format.sample_format)


def as_bytes(decoded: NDArray[Any], audio_format: AudioFormat) -> bytes:
    """Return PCM of what decoders give; of S24 they fill the upper three bytes of four."""
    if audio_format.sample_format != SAMPLE_FORMAT_S24:
        return decoded.tobytes()
    octets = np.ascontiguousarray(decoded).reshape(-1, 1).view(np.uint8)
    assert not octets[:, 0].any()
    return octets[:, 1:].tobytes()


@pytest.mark.parametrize("audio_format", [f for f in LOSSLESS_FORMATS if f.encoding == ENCODING_FLAC], ids=name)
def test_a_flac_file_says_its_length_so_that_readers_can_seek(audio_format: AudioFormat) -> None:
    song = words(20_011, audio_format.channels)
    encoder = open_encoder(audio_format, frame_count=len(song))
    data = joined(encoder.encode(song) + encoder.finish())
    with av.open(io.BytesIO(data)) as container:
        [stream] = container.streams.audio
        assert (stream.duration, stream.time_base) == (20_011, Fraction(1, audio_format.sample_rate_hz))
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert file.frames == 20_011
        file.seek(12_345)
        read = file.read(dtype=SOUNDFILE_KINDS[audio_format.sample_format], always_2d=True)
    assert as_bytes(read, audio_format) == to_bytes(song[12_345:], audio_format.sample_format)


def test_a_flac_file_of_unknown_length_says_so() -> None:
    [header, *_] = encode(complete(encoding=ENCODING_FLAC), words(20_011, 2))
    assert int.from_bytes(header.data[18:26]) % 2**36 == 0


@pytest.mark.parametrize("sample_format", [SAMPLE_FORMAT_S16, SAMPLE_FORMAT_S24, SAMPLE_FORMAT_F32])
def test_pieces_of_pcm_are_their_frames(sample_format: SampleFormat.ValueType) -> None:
    song = words(20_011, 2)
    pieces = encode(complete(encoding=ENCODING_PCM, sample_format=sample_format), song)
    assert [piece.frame_count for piece in pieces] == [10_007, 10_004]
    assert pieces[0].data == to_bytes(song[:10_007], sample_format)
    assert joined(pieces) == to_bytes(song, sample_format)


@pytest.mark.parametrize("audio_format", LOSSY[::2], ids=name)
def test_what_is_louder_than_full_scale_is_clipped(audio_format: AudioFormat) -> None:
    song = 20 * music(audio_format, 0.2)
    loud, clipped = (decode(joined(encode(audio_format, part)), audio_format) for part in (song, np.clip(song, -1, 1)))
    assert np.array_equal(loud, clipped)


@pytest.mark.parametrize("audio_format", [*FORMATS[::2], complete(encoding=ENCODING_WAV)], ids=name)
@pytest.mark.parametrize("num_frames", [0, 1, 4_608])
def test_short_streams_are_whole(audio_format: AudioFormat, num_frames: int) -> None:
    pieces = encode(audio_format, music(audio_format, num_frames / audio_format.sample_rate_hz))
    assert sum(piece.frame_count for piece in pieces) == num_frames
    if num_frames:
        assert len(decode(joined(pieces), audio_format)) - open_encoder(audio_format).delay_frames >= num_frames


@pytest.mark.parametrize("audio_format", [complete(encoding=encoding) for encoding in CODECS], ids=name)
def test_streams_dropped_on_the_way_leave_nothing_behind(audio_format: AudioFormat) -> None:
    song = music(audio_format, 0.05)

    def drop_streams(count: int) -> int:
        for _ in range(count):
            open_encoder(audio_format).encode(song)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    gc.disable()  # which may come late
    try:
        growth_bytes = -drop_streams(20) + drop_streams(200)
    finally:
        gc.enable()
    assert growth_bytes < 200 * 10_000  # an encoder takes more than ten times that
