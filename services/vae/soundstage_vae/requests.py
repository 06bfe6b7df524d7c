"""Request streams of the codec, checked: the setup first and only first, then runs that leave no gap."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeSetup, EncodeRequest, EncodeSetup
from soundstage.type.v1.audio_pb2 import AudioChunk, SampleFormat
from soundstage_runtime.errors import InvalidRequestError, ServiceError, Violation
from soundstage_runtime.score import LATENT_CHANNELS, MAX_LATENT_FRAMES, SAMPLES_PER_LATENT
from soundstage_runtime.tensors import from_proto
from soundstage_vae.pcm import SAMPLE_FORMATS, frame_size_bytes, from_bytes

R = TypeVar("R", DecodeRequest, EncodeRequest)


class CallerStalledError(ServiceError):
    """The caller keeps its stream open and sends nothing."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "CALLER_STALLED"


async def patient(requests: AsyncIterator[R], *, timeout_s: float) -> AsyncGenerator[R]:
    """Pass requests on; raises CallerStalledError when one takes longer than `timeout_s` to come."""
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                request = await anext(requests, None)
        except TimeoutError as error:
            raise CallerStalledError(f"no request came for {timeout_s:g} s") from error
        if request is None:
            return
        yield request


async def read_decode_setup(requests: AsyncIterator[DecodeRequest]) -> DecodeSetup:
    """Await the first message's setup; raises InvalidRequestError naming every bad field."""
    setup = (await _first(requests)).setup
    _check_setup("latent_frames", setup.latent_frames, 1, MAX_LATENT_FRAMES, setup.sample_format)
    return setup


async def read_encode_setup(requests: AsyncIterator[EncodeRequest]) -> EncodeSetup:
    """Await the first message's setup; raises InvalidRequestError naming every bad field."""
    setup = (await _first(requests)).setup
    longest = MAX_LATENT_FRAMES * SAMPLES_PER_LATENT
    _check_setup("frame_count", setup.frame_count, SAMPLES_PER_LATENT, longest, setup.sample_format)
    return setup


async def read_latents(
    requests: AsyncIterator[DecodeRequest], setup: DecodeSetup
) -> AsyncIterator[NDArray[np.float32]]:
    """Yield runs of latents [frames, 64] up to the setup's length; raises InvalidRequestError."""
    place = _Place("latents", "setup.latent_frames", setup.latent_frames)
    async for request in requests:
        place.check_part(request.WhichOneof("part"))
        chunk = request.latents
        violations = place.check_start(chunk.first_frame)
        try:
            latents = from_proto(chunk.tensor, "latents.tensor", shape=(None, LATENT_CHANNELS))
        except InvalidRequestError as error:
            raise InvalidRequestError([*violations, *error.violations]) from error
        place.advance(len(latents), violations)
        yield latents
    place.check_end()


async def read_audio(requests: AsyncIterator[EncodeRequest], setup: EncodeSetup) -> AsyncIterator[NDArray[np.float32]]:
    """Yield runs of samples [n, 2] up to the setup's length; raises InvalidRequestError."""
    place = _Place("audio", "setup.frame_count", setup.frame_count)
    async for request in requests:
        place.check_part(request.WhichOneof("part"))
        chunk = request.audio
        violations = [*place.check_start(chunk.first_frame), *_check_size(chunk, setup.sample_format)]
        samples = np.empty((0, 2), np.float32) if violations else from_bytes(chunk.data, setup.sample_format)
        if not np.isfinite(samples).all():
            violations.append(
                Violation(field="audio.data", description="holds NaN or infinity; every sample must be finite")
            )
        place.advance(len(samples), violations)
        yield samples
    place.check_end()


class _Place:
    """How far a stream of chunks has come on its way to the length that its setup promised."""

    def __init__(self, part: str, length_field: str, length: int) -> None:
        self._part, self._length_field, self._length = part, length_field, length
        self._next = 0
        self._messages = 1

    def check_part(self, found: str | None) -> None:
        self._messages += 1
        if found != self._part:
            what = "carries nothing" if found is None else f"carries {found}, which only the first message may"
            raise _invalid(self._part, f"is missing: message {self._messages} {what}; every later one carries it")

    def check_start(self, first_frame: int) -> list[Violation]:
        if first_frame == self._next:
            return []
        description = f"is {first_frame}; must be {self._next}, where the last chunk ended"
        return [Violation(field=f"{self._part}.first_frame", description=description)]

    def advance(self, num_frames: int, violations: Sequence[Violation]) -> None:
        if violations:
            raise InvalidRequestError(violations)
        self._next += num_frames
        if self._next > self._length:
            raise _invalid(self._part, f"reaches frame {self._next}; {self._length_field} is {self._length}")

    def check_end(self) -> None:
        if self._next < self._length:
            raise _invalid(self._part, f"ended after frame {self._next}; {self._length_field} is {self._length}")


async def _first(requests: AsyncIterator[R]) -> R:
    request = await anext(requests, None)
    part = request.WhichOneof("part") if request is not None else None
    if request is None or part != "setup":
        found = "there is no message" if request is None else f"the first message carries {part or 'nothing'}"
        raise _invalid("setup", f"is missing: {found}; the first message must carry it")
    return request


def _check_setup(field: str, length: int, shortest: int, longest: int, sample_format: SampleFormat.ValueType) -> None:
    violations: list[Violation] = []
    if not shortest <= length <= longest:
        description = f"is {length}; must be {shortest} to {longest}"
        violations.append(Violation(field=f"setup.{field}", description=description))
    if sample_format not in SAMPLE_FORMATS:
        known = ", ".join(SampleFormat.Name(value) for value in sorted(SAMPLE_FORMATS))
        violations.append(
            Violation(field="setup.sample_format", description=f"is {sample_format}; must be one of {known}")
        )
    if violations:
        raise InvalidRequestError(violations)


def _check_size(chunk: AudioChunk, sample_format: SampleFormat.ValueType) -> list[Violation]:
    violations: list[Violation] = []
    if chunk.frame_count == 0:
        violations.append(Violation(field="audio.frame_count", description="is 0; must be at least 1"))
    size_bytes = chunk.frame_count * frame_size_bytes(sample_format)
    if len(chunk.data) != size_bytes:
        description = f"holds {len(chunk.data)} bytes; {chunk.frame_count} stereo frames take {size_bytes}"
        violations.append(Violation(field="audio.data", description=description))
    return violations


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError([Violation(field=field, description=description)])
