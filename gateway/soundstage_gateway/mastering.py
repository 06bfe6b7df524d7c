"""Mastering: a song's samples at 48 kHz in stereo become those of the output."""

from typing import Final

import numpy as np
import soxr
from numpy.typing import NDArray

from soundstage_gateway.audio_file import Samples
from soundstage_gateway.audio_format import Output
from soundstage_runtime.score import SAMPLE_RATE_HZ

_QUALITY: Final = "VHQ"


class Mastering:
    """Masters one stream: gain, fades, the mean of both channels if one is asked for, then the sample rate.

    `num_frames` is the whole song's length at the output's rate, rounded, halves up. However the song is cut, the same
    bits come out.
    """

    def __init__(self, output: Output, *, song_frames: int, peak: float | None, start_frame: int = 0) -> None:
        """Begin at frame `start_frame`, 0 unless the output is at 48 kHz; `peak` is the song's before any gain."""
        rate_hz, channels = output.format.sample_rate_hz, output.format.channels
        assert start_frame == 0 or rate_hz == SAMPLE_RATE_HZ, "a resampler hears the song from its beginning"
        assert output.peak_dbfs is None or peak is not None, "a peak must be known before it is moved"
        self.num_frames: Final = (2 * song_frames * rate_hz + SAMPLE_RATE_HZ) // (2 * SAMPLE_RATE_HZ)
        self._song_frames = song_frames
        self._gain = _gain(output, peak or 0)
        self._fade_in_frames = round(output.fade_in_s * SAMPLE_RATE_HZ)
        self._fade_out_frames = round(output.fade_out_s * SAMPLE_RATE_HZ)
        self._is_mono = channels == 1
        self._resampler = (
            None
            if rate_hz == SAMPLE_RATE_HZ
            else soxr.ResampleStream(SAMPLE_RATE_HZ, rate_hz, channels, dtype="float32", quality=_QUALITY)
        )
        self._next_frame = start_frame

    def feed(self, samples: Samples, *, last: bool) -> NDArray[np.float32]:
        """Master the song's next samples [n, 2] to [m, channels]; what a resampler holds back comes at the `last`."""
        is_plain = self._gain == 1 and not (self._fade_in_frames or self._fade_out_frames)
        mastered = samples if is_plain else samples * self._levels(len(samples))[:, None]
        self._next_frame += len(samples)
        if self._is_mono:
            mastered = mastered.mean(axis=1, keepdims=True, dtype=np.float32)
        return self._resampler.resample_chunk(mastered, last=last) if self._resampler else mastered

    def _levels(self, num_frames: int) -> NDArray[np.float32]:
        """Return what the next frames are multiplied by: the song's first and last frame are silent if they fade."""
        frames = np.arange(self._next_frame, self._next_frame + num_frames)
        levels = np.full(num_frames, self._gain)
        if self._fade_in_frames:
            levels *= np.minimum(1, frames / self._fade_in_frames)
        if self._fade_out_frames:
            levels *= np.minimum(1, (self._song_frames - 1 - frames) / self._fade_out_frames)
        return levels.astype(np.float32)


def _gain(output: Output, peak: float) -> float:
    """Return the gain; silence, whose peak is 0, has none to be moved by."""
    to_peak = 1 if output.peak_dbfs is None or peak == 0 else 10 ** (output.peak_dbfs / 20) / peak
    return to_peak * 10 ** (output.gain_db / 20)
