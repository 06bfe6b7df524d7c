"""What a listener gets of a tape: mastered, encoded, in time."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

import numpy as np

from soundstage.music.v1.song_service_pb2 import StreamAudioResponse
from soundstage.type.v1.audio_pb2 import (
    ENCODING_PCM,
    ENCODING_WAV,
    AudioChunk,
    AudioFormat,
    AudioHeader,
    AudioTrailer,
)
from soundstage_gateway.audio_encoder import Encoder, Piece, open_encoder
from soundstage_gateway.audio_file import Samples
from soundstage_gateway.audio_format import Output, media_type
from soundstage_gateway.mastering import Mastering
from soundstage_gateway.tape import Tape
from soundstage_runtime.pcm import to_bytes
from soundstage_runtime.score import SAMPLE_RATE_HZ
from soundstage_runtime.validation import Checks

_CHEAP: Final = (ENCODING_PCM, ENCODING_WAV)


async def play(
    tape: Tape, output: Output, *, first_frame: int = 0, frame_count: int | None = None, peak: float | None = None
) -> AsyncGenerator[StreamAudioResponse, None]:
    """Yield a header, chunks and a trailer for frames counted at the output's own rate, all to the end by default.

    `peak` is the whole song's, for an output that asks for another. At 48 kHz the tape is read from the frame that is
    wanted. At other rates it is read from its beginning, so that the resampled frames are the same to the bit. Raises
    ServiceError.
    """
    is_resampled = output.format.sample_rate_hz != SAMPLE_RATE_HZ
    start = 0 if is_resampled else first_frame
    mastering = Mastering(output, song_frames=tape.num_frames, peak=peak, start_frame=start)
    stop = _find_stop(first_frame, frame_count, mastering.num_frames)
    encoder = open_encoder(output.format, frame_count=stop - first_frame)
    yield StreamAudioResponse(
        audio_header=AudioHeader(
            format=output.format,
            media_type=media_type(output.format),
            first_frame=first_frame,
            frame_count=stop - first_frame,
            encoder_delay_frames=encoder.delay_frames,
        )
    )
    digest, loudest = hashlib.sha256(), 0.0
    pace = _Pace(output)
    place = first_frame
    source = tape.read(start, tape.num_frames if is_resampled else stop)
    async with aclosing(_master(source, mastering, (start, first_frame, stop), tape.num_frames)) as runs:
        async for samples in runs:
            loudest = max(loudest, float(np.abs(samples).max()))
            pieces = await _encode(encoder, samples, output.format)
            is_bare = output.format.encoding == ENCODING_PCM
            digest.update(pieces[0].data if is_bare else to_bytes(samples, output.format.sample_format))
            for piece in pieces:
                await pace.keep(piece.frame_count)
                yield _chunk(piece, place)
                place += piece.frame_count
    for piece in await asyncio.to_thread(encoder.finish):
        yield _chunk(piece, place)
        place += piece.frame_count
    trailer = AudioTrailer(frame_count=stop - first_frame, pcm_sha256=digest.digest(), peak=loudest)
    yield StreamAudioResponse(audio_trailer=trailer)


def _find_stop(first_frame: int, frame_count: int | None, num_frames: int) -> int:
    """Return the frame after the last; raises InvalidRequestError. There may be nothing left."""
    checks = Checks()
    if first_frame > num_frames:
        checks.refuse("first_frame", f"is {first_frame}; the song ends after {num_frames} frames at this rate")
    elif frame_count is not None and frame_count > num_frames - first_frame:
        checks.refuse("frame_count", f"is {frame_count}; must be at most {num_frames - first_frame}, the song's end")
    checks.finish()
    return num_frames if frame_count is None else first_frame + frame_count


async def _master(
    source: AsyncGenerator[Samples, None], mastering: Mastering, span: tuple[int, int, int], song_frames: int
) -> AsyncGenerator[Samples, None]:
    """Yield output frames [first, stop) of a source that begins with frame `start` of the song; `span` is all three."""
    start, first, stop = span
    if first == stop:
        return
    place = heard = start
    async with aclosing(source) as pieces:
        async for piece in pieces:
            heard += len(piece)
            samples = mastering.feed(piece, last=heard == song_frames)
            wanted = samples[max(0, first - place) : stop - place]
            place += len(samples)
            if len(wanted):
                yield wanted
            if place >= stop:
                break


async def _encode(encoder: Encoder, samples: Samples, audio_format: AudioFormat) -> Sequence[Piece]:
    """Encode, on another thread what takes a while."""
    if audio_format.encoding in _CHEAP:
        return encoder.encode(samples)
    return await asyncio.to_thread(encoder.encode, samples)


def _chunk(piece: Piece, first_frame: int) -> StreamAudioResponse:
    chunk = AudioChunk(first_frame=first_frame, frame_count=piece.frame_count, data=piece.data)
    return StreamAudioResponse(audio_chunk=chunk)


class _Pace:
    """Keeps a stream at most so far ahead of a playback that began with its first chunk."""

    def __init__(self, output: Output) -> None:
        self._rate_hz = output.format.sample_rate_hz
        self._max_buffer_s = output.max_buffer_s
        self._sent_frames = 0
        self._begun_s: float | None = None

    async def keep(self, frame_count: int) -> None:
        """Wait until `frame_count` more frames may be sent."""
        if self._max_buffer_s is None:
            return
        now_s = time.monotonic()
        self._begun_s = now_s if self._begun_s is None else self._begun_s
        self._sent_frames += frame_count
        ahead_s = self._sent_frames / self._rate_hz - (now_s - self._begun_s)
        await asyncio.sleep(max(0.0, ahead_s - self._max_buffer_s))
