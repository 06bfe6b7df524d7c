"""Audio files: bytes in, 48 kHz stereo samples out. As a program, one file in bounded time and memory."""

import json
import resource
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NoReturn, cast

import av
import numpy as np
import soxr
from av.audio.codeccontext import AudioCodecContext
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.error import FFmpegError
from numpy.typing import NDArray

from soundstage_gateway.file_length import is_cut, tells_length
from soundstage_runtime.score import CHANNELS, DURATION_RANGE_S, SAMPLE_RATE_HZ, SAMPLES_PER_LATENT

Samples = NDArray[np.float32]  # [frames, 2]

MAX_CHANNELS: Final = 8
RATES_HZ: Final = (8_000, 384_000)
MEMORY_LIMIT_BYTES: Final = 512 << 20  # ten minutes take half of it
TIME_LIMIT_S: Final = 60
_SILENCE: Final = 1e-6  # below it nothing can be heard
_LONGEST_FRAMES: Final = int(DURATION_RANGE_S[1]) * SAMPLE_RATE_HZ
_SLACK_S: Final = 0.25  # what codecs may leave out of the length that a file tells, at its ends
_FORMATS: Final = "wav, flac, mp3, ogg or m4a"
# Other demuxers, playlists among them, could be told to open files and addresses of their own.
_DEMUXERS: Final = "wav,flac,mp3,ogg,mov"
_WORDS_PER_UNIT: Final[dict[str, Callable[[NDArray[Any]], NDArray[Any]]]] = {
    "u8": lambda words: (words.astype(np.float32) - 128) / 128,
    "s16": lambda words: words.astype(np.float32) / np.float32(32_767),  # as in pcm.py, so that they come back
    "s32": lambda words: words / 2.0**31,
    "flt": lambda words: words,
    "dbl": lambda words: words,
}


class FileRefusedError(Exception):
    """A file cannot be used; the message says what it has or does, and what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a file holds: samples [frames, 2] at 48 kHz, and the file's own rate and number of channels."""

    samples: Samples
    is_silent: bool
    sample_rate_hz: int
    channels: int


def read_audio_file(file: BinaryIO) -> Recording:
    """Decode a whole file of 0.04 to 600 s; raises FileRefusedError.

    One channel is doubled, the first two of more are kept. 16-bit samples at 48 kHz are kept to the bit.
    """
    if is_cut(file):
        _refuse(f"ends too early; send a whole {_FORMATS} file")
    trusts_length = tells_length(file)
    file.seek(0)
    try:
        options = {"format_whitelist": _DEMUXERS}
        with av.open(file, "r", options=options, metadata_errors="replace") as container:
            if not container.streams.audio:
                _refuse(f"holds no audio; send a {_FORMATS} file")
            stream = container.streams.audio[0]
            context = cast(AudioCodecContext | None, stream.codec_context)
            if context is None:
                _refuse(f"has audio of an unknown codec; send a {_FORMATS} file")
            rate_hz, channels = context.sample_rate, context.channels
            _check_layout(rate_hz, channels)
            told_s = _told_length_s(stream) if trusts_length else 0.0
            frames = _stereo_frames(container.decode(audio=0), rate_hz, channels)
            samples = _gather(frames if rate_hz == SAMPLE_RATE_HZ else _resample(frames, rate_hz))
    except MemoryError:
        _refuse(f"takes too much memory to decode; send a plain {_FORMATS} file")
    except FFmpegError as error:
        _refuse(f"cannot be decoded ({error.strerror}); send a whole {_FORMATS} file")
    length_s = len(samples) / SAMPLE_RATE_HZ
    if length_s < told_s - _SLACK_S:
        _refuse(f"holds {length_s:g} s of the {told_s:g} s that it tells; send a whole file")
    return Recording(samples=samples, is_silent=is_silent(samples), sample_rate_hz=rate_hz, channels=channels)


def is_silent(samples: Samples) -> bool:
    """Tell whether nothing can be heard in samples [n, 2]."""
    return bool(max(samples.max(), -samples.min()) < _SILENCE)


def clamp(samples: Samples, *, out: Samples | None = None) -> Samples:
    """Keep samples between -1 and 1, as all that is heard is; a 16-bit source may reach a step below, and keeps it."""
    return np.clip(samples, np.float32(-32_768 / 32_767), np.float32(1), out=out)


def _told_length_s(stream: AudioStream) -> float:
    """Return the length that a file tells, 0 if it tells none, and refuse one that is too long before it is decoded."""
    told_s = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    if told_s > DURATION_RANGE_S[1] + _SLACK_S:
        _refuse(f"is {told_s:g} s long; send at most {DURATION_RANGE_S[1]:g} s")
    return told_s


def _check_layout(rate_hz: int, channels: int) -> None:
    if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
        _refuse(f"has {rate_hz} samples a second; send a file of {RATES_HZ[0]} to {RATES_HZ[1]}")
    if not 1 <= channels <= MAX_CHANNELS:
        _refuse(f"has {channels} channels; send a file of 1 to {MAX_CHANNELS}")


def _stereo_frames(frames: Iterator[AudioFrame], rate_hz: int, channels: int) -> Iterator[Samples]:
    for frame in frames:
        if (frame.sample_rate, frame.layout.nb_channels) != (rate_hz, channels):
            _refuse("changes its sample rate or channels on the way; send a file that keeps them")
        if frame.format.packed.name not in _WORDS_PER_UNIT:
            _refuse(f"has samples of the kind {frame.format.packed.name}; send a file of 8 to 32 bits, or of floats")
        words = frame.to_ndarray()
        by_frame = words.T if frame.format.is_planar else words.reshape(-1, channels)
        samples = _WORDS_PER_UNIT[frame.format.packed.name](by_frame[:, :CHANNELS]).astype(np.float32)
        if not np.isfinite(samples).all():
            _refuse("holds NaN or infinity; send a file whose samples are all finite")
        yield np.repeat(samples, CHANNELS // samples.shape[1], axis=1)


def _resample(frames: Iterator[Samples], rate_hz: int) -> Iterator[Samples]:
    resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, CHANNELS, dtype="float32")
    for samples in frames:
        yield resampler.resample_chunk(samples)
    yield resampler.resample_chunk(np.empty((0, CHANNELS), np.float32), last=True)


def _gather(pieces: Iterator[Samples]) -> Samples:
    """Join pieces [n, 2], and stop as soon as they are too long."""
    kept = np.empty((_LONGEST_FRAMES, CHANNELS), np.float32)  # takes memory only where it is written
    length = 0
    for samples in pieces:
        start, length = length, length + len(samples)
        if length > _LONGEST_FRAMES:
            _refuse(f"is longer than {DURATION_RANGE_S[1]:g} s; cut it")
        clamp(samples, out=kept[start:length])
    if length < SAMPLES_PER_LATENT:
        shortest_s = SAMPLES_PER_LATENT / SAMPLE_RATE_HZ
        _refuse(f"is {length / SAMPLE_RATE_HZ:g} s long; send at least {shortest_s:g} s")
    return kept[:length]


def _refuse(description: str) -> NoReturn:
    raise FileRefusedError(description)


def main() -> None:
    """Decode standard input; write a line of JSON, and behind it samples unless the line says "refused"."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT_S, TIME_LIMIT_S))
    output = sys.stdout.buffer
    try:
        recording = read_audio_file(cast(BinaryIO, sys.stdin.buffer))
    except FileRefusedError as error:
        output.write(json.dumps({"refused": str(error)}).encode())
        return
    found = {
        "is_silent": recording.is_silent,
        "sample_rate_hz": recording.sample_rate_hz,
        "channels": recording.channels,
    }
    output.write(json.dumps(found).encode() + b"\n")
    output.write(recording.samples.data)


if __name__ == "__main__":
    main()
