"""Audio files made in the tests: tones and noise in the formats that clients send."""

import io
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
import soundfile
from av.audio.stream import AudioStream
from numpy.typing import NDArray


def tone(duration_s: float, rate_hz: int, channels: int = 1, *, frequency_hz: float = 440.0) -> NDArray[np.float32]:
    """A sine at half of full scale, [frames, channels], alike in all channels."""
    times_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    return np.repeat((0.5 * np.sin(2 * np.pi * frequency_hz * times_s))[:, None], channels, axis=1).astype(np.float32)


def words(num_frames: int, channels: int = 2, *, seed: int = 0) -> NDArray[np.int16]:
    """Noise of 16-bit words over their whole range, [frames, channels]."""
    noise = np.random.default_rng(seed).integers(-32_768, 32_768, (num_frames, channels), np.int16)
    noise[:2] = (-32_768, 32_767)[:channels] if channels == 2 else -32_768
    return noise


def sound_file(samples: NDArray[Any], rate_hz: int, file_format: str, subtype: str | None = None) -> bytes:
    """Write samples [frames, channels] with libsndfile: wav, flac, ogg or mp3."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=file_format, subtype=subtype)
    return buffer.getvalue()


def m4a(samples: NDArray[np.float32], rate_hz: int, *, container: str = "ipod", codec: str = "alac") -> bytes:
    """Write samples [frames, 2] with FFmpeg."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = cast(AudioStream, file.add_stream(codec, rate=rate_hz, layout="stereo"))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()
