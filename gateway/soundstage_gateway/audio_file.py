"""Audio files: bytes in, 48 kHz stereo samples out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NoReturn

import av
import numpy as np
import soxr
from av.audio.frame import AudioFrame
from av.error import FFmpegError
from numpy.typing import NDArray

from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import CHANNELS, DURATION_RANGE_S, SAMPLE_RATE_HZ, SAMPLES_PER_LATENT

Samples = NDArray[np.float32]  # [frames, 2]

MAX_CHANNELS: Final = 8
RATES_HZ: Final = (8_000, 384_000)
_SILENCE: Final = 1e-6  # below it nothing can be heard
_LONGEST_FRAMES: Final = int(DURATION_RANGE_S[1]) * SAMPLE_RATE_HZ
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a file holds: samples [frames, 2] at 48 kHz, and the file's own rate and number of channels."""

    samples: Samples
    is_silent: bool
    sample_rate_hz: int
    channels: int


def read_audio_file(file: BinaryIO) -> Recording:
    """Decode a file of 0.04 to 600 s; raises InvalidRequestError saying what is wrong with it.

    One channel is doubled, the first two of more are kept. 16-bit samples at 48 kHz are kept to the bit.
    """
    try:
        with av.open(file, "r", options={"format_whitelist": _DEMUXERS}) as container:
            if not container.streams.audio:
                _refuse(f"holds no audio; send a {_FORMATS} file")
            context = container.streams.audio[0].codec_context
            rate_hz, channels = context.sample_rate, context.channels
            _check_layout(rate_hz, channels)
            frames = _stereo_frames(container.decode(audio=0), rate_hz, channels)
            samples = _gather(frames if rate_hz == SAMPLE_RATE_HZ else _resample(frames, rate_hz))
    except FFmpegError as error:
        _refuse(f"cannot be decoded ({error.strerror}); send a whole {_FORMATS} file")
    is_silent = bool(np.abs(samples).max() < _SILENCE)
    return Recording(samples=samples, is_silent=is_silent, sample_rate_hz=rate_hz, channels=channels)


def _check_layout(rate_hz: int, channels: int) -> None:
    if not RATES_HZ[0] <= rate_hz <= RATES_HZ[1]:
        _refuse(f"has {rate_hz} samples a second; send a file of {RATES_HZ[0]} to {RATES_HZ[1]}")
    if not 1 <= channels <= MAX_CHANNELS:
        _refuse(f"has {channels} channels; send a file of 1 to {MAX_CHANNELS}")


def _stereo_frames(frames: Iterator[AudioFrame], rate_hz: int, channels: int) -> Iterator[Samples]:
    for frame in frames:
        if (frame.sample_rate, frame.layout.nb_channels) != (rate_hz, channels):
            _refuse("changes its sample rate or channels on the way; send a file that keeps them")
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
    kept: list[Samples] = []
    length = 0
    for samples in pieces:
        kept.append(samples)
        length += len(samples)
        if length > _LONGEST_FRAMES:
            _refuse(f"is longer than {DURATION_RANGE_S[1]:g} s; cut it")
    if length < SAMPLES_PER_LATENT:
        shortest_s = SAMPLES_PER_LATENT / SAMPLE_RATE_HZ
        _refuse(f"is {length / SAMPLE_RATE_HZ:g} s long; send at least {shortest_s:g} s")
    # A 16-bit source may reach a step below -1, and keeps it.
    return np.clip(np.concatenate(kept), np.float32(-32_768 / 32_767), np.float32(1))


def _refuse(description: str) -> NoReturn:
    raise InvalidRequestError([Violation(field="data", description=description)])
