"""Audio formats: what a client may ask of the output, checked whole and with every default filled in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

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
    SAMPLE_FORMAT_UNSPECIFIED,
    AudioFormat,
    Encoding,
    SampleFormat,
)
from soundstage_runtime.score import CHANNELS, SAMPLE_RATE_HZ
from soundstage_runtime.validation import Checks

LOSSLESS: Final = frozenset({ENCODING_PCM, ENCODING_WAV, ENCODING_FLAC})
OPUS: Final = frozenset({ENCODING_OGG_OPUS, ENCODING_WEBM_OPUS, ENCODING_MP4_OPUS})
EXTENSIONS: Final[Mapping[str, AudioFormat]] = {
    "pcm": AudioFormat(encoding=ENCODING_PCM),
    "wav": AudioFormat(encoding=ENCODING_WAV),
    "flac": AudioFormat(encoding=ENCODING_FLAC),
    "mp3": AudioFormat(encoding=ENCODING_MP3),
    "ogg": AudioFormat(encoding=ENCODING_OGG_OPUS),
    "webm": AudioFormat(encoding=ENCODING_WEBM_OPUS),
    "m4a": AudioFormat(encoding=ENCODING_MP4_AAC),
}
_MEDIA_TYPES: Final = {
    ENCODING_WAV: "audio/wav",
    ENCODING_FLAC: "audio/flac",
    ENCODING_MP3: "audio/mpeg",
    ENCODING_OGG_OPUS: "audio/ogg; codecs=opus",
    ENCODING_WEBM_OPUS: "audio/webm; codecs=opus",
    ENCODING_MP4_AAC: "audio/mp4; codecs=mp4a.40.2",
    ENCODING_MP4_OPUS: "audio/mp4; codecs=opus",
}
_PCM_MEDIA_TYPES: Final = {
    SAMPLE_FORMAT_S16: "audio/L16",
    SAMPLE_FORMAT_S24: "audio/L24",
    SAMPLE_FORMAT_F32: "audio/x-F32",
}
SAMPLE_RATES_HZ: Final = (SAMPLE_RATE_HZ, 44_100, 24_000)
_OPUS_RATES_HZ: Final = (SAMPLE_RATE_HZ, 24_000)
_BIT_RATES_BPS: Final = (32_000, 320_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Checked output options. `format` has every field that its encoding knows; the others are 0."""

    format: AudioFormat
    gain_db: float
    peak_dbfs: float | None
    fade_in_s: float
    fade_out_s: float
    max_buffer_s: float | None


def read_output(checks: Checks, options: OutputOptions, *, field: str = "output", can_normalise: bool) -> Output:
    """Check every field, and refuse with `checks` what is bad; peak_dbfs is taken only if `can_normalise`."""
    checks.number(f"{field}.gain_db", options.gain_db, -60, 20)
    peak_dbfs = options.peak_dbfs if options.HasField("peak_dbfs") else None
    if peak_dbfs is not None and not can_normalise:
        checks.refuse(f"{field}.peak_dbfs", "is set before the song's peak is known; leave it to StreamAudio")
    elif peak_dbfs is not None:
        checks.number(f"{field}.peak_dbfs", peak_dbfs, -60, 0)
    checks.number(f"{field}.fade_in_s", options.fade_in_s, 0, 60)
    checks.number(f"{field}.fade_out_s", options.fade_out_s, 0, 60)
    max_buffer_s = options.max_buffer_s if options.HasField("max_buffer_s") else None
    if max_buffer_s is not None:
        checks.number(f"{field}.max_buffer_s", max_buffer_s, 0.5, 600)
    return Output(
        format=_read_format(checks, options.format, f"{field}.format"),
        gain_db=options.gain_db,
        peak_dbfs=peak_dbfs,
        fade_in_s=options.fade_in_s,
        fade_out_s=options.fade_out_s,
        max_buffer_s=max_buffer_s,
    )


def media_type(audio_format: AudioFormat) -> str:
    """Return the MIME type of a complete format. PCM says that it is little-endian, as audio/L16 alone would not be."""
    if audio_format.encoding != ENCODING_PCM:
        return _MEDIA_TYPES[audio_format.encoding]
    kind = _PCM_MEDIA_TYPES[audio_format.sample_format]
    rate_hz, channels = audio_format.sample_rate_hz, audio_format.channels
    return f"{kind}; rate={rate_hz}; channels={channels}; endianness=little-endian"


def _read_format(checks: Checks, asked: AudioFormat, field: str) -> AudioFormat:
    encoding = asked.encoding or ENCODING_PCM
    if encoding not in Encoding.values():
        checks.refuse(f"{field}.encoding", f"is {encoding}; must be one of {', '.join(Encoding.keys()[1:])}")
        return AudioFormat()
    sample_rate_hz, channels = asked.sample_rate_hz or SAMPLE_RATE_HZ, asked.channels or CHANNELS
    rates_hz = _OPUS_RATES_HZ if encoding in OPUS else SAMPLE_RATES_HZ
    if sample_rate_hz not in rates_hz:
        known = ", ".join(map(str, rates_hz))
        checks.refuse(f"{field}.sample_rate_hz", f"is {sample_rate_hz}; {_short(encoding)} takes one of {known}")
    if channels not in (1, 2):
        checks.refuse(f"{field}.channels", f"is {channels}; must be 1 or 2")
    return AudioFormat(
        encoding=encoding,
        sample_format=_read_sample_format(checks, asked, encoding, f"{field}.sample_format"),
        sample_rate_hz=sample_rate_hz,
        channels=channels,
        bit_rate_bps=_read_bit_rate(checks, asked, encoding, sample_rate_hz, channels, f"{field}.bit_rate_bps"),
    )


def _read_sample_format(
    checks: Checks, asked: AudioFormat, encoding: Encoding.ValueType, field: str
) -> SampleFormat.ValueType:
    if encoding not in LOSSLESS:
        if asked.sample_format:
            checks.refuse(field, f"is {_name(asked.sample_format)}; leave it out, as {_short(encoding)} has none")
        return SAMPLE_FORMAT_UNSPECIFIED
    known = [SAMPLE_FORMAT_S16, SAMPLE_FORMAT_S24, *([] if encoding == ENCODING_FLAC else [SAMPLE_FORMAT_F32])]
    found = asked.sample_format or SAMPLE_FORMAT_S16
    if found not in known:
        checks.refuse(field, f"is {_name(found)}; {_short(encoding)} takes one of {', '.join(map(_name, known))}")
    return found


def _read_bit_rate(
    checks: Checks, asked: AudioFormat, encoding: Encoding.ValueType, sample_rate_hz: int, channels: int, field: str
) -> int:
    if encoding in LOSSLESS:
        if asked.bit_rate_bps:
            checks.refuse(field, f"is {asked.bit_rate_bps}; leave it out, as {_short(encoding)} has none")
        return 0
    highest_bps = min(_BIT_RATES_BPS[1], _highest_bit_rate_bps(encoding, sample_rate_hz, channels))
    if asked.bit_rate_bps:
        checks.number(field, asked.bit_rate_bps, _BIT_RATES_BPS[0], highest_bps)
    return asked.bit_rate_bps or min(128_000 if encoding in OPUS else 192_000, highest_bps)


def _highest_bit_rate_bps(encoding: Encoding.ValueType, sample_rate_hz: int, channels: int) -> int:
    """Return what the standards allow: MPEG-2 layer III 160000, AAC 6144 bits a block of 1024 and channel."""
    if encoding == ENCODING_MP3:
        return 160_000 if sample_rate_hz < 32_000 else 320_000
    return 256_000 * channels if encoding in OPUS else 6 * sample_rate_hz * channels


def _name(sample_format: int) -> str:
    known = sample_format in SampleFormat.values()
    return SampleFormat.Name(SampleFormat.ValueType(sample_format)) if known else str(sample_format)


def _short(encoding: Encoding.ValueType) -> str:
    return Encoding.Name(encoding).removeprefix("ENCODING_")
