"""What the codec's request streams hold, checked: setups, and runs of samples."""

from collections.abc import AsyncIterator

import numpy as np
from numpy.typing import NDArray

from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeSetup, EncodeRequest, EncodeSetup
from soundstage.type.v1.audio_pb2 import AudioChunk, SampleFormat
from soundstage_runtime.errors import Violation
from soundstage_runtime.pcm import SAMPLE_FORMATS, frame_size_bytes, from_bytes
from soundstage_runtime.request_stream import Place, read_first
from soundstage_runtime.score import MAX_LATENT_FRAMES, SAMPLES_PER_LATENT
from soundstage_runtime.validation import Checks


async def read_decode_setup(requests: AsyncIterator[DecodeRequest]) -> DecodeSetup:
    """Await the first message's setup; raises InvalidRequestError naming every bad field."""
    setup = (await read_first(requests)).setup
    checks = _check_setup("latent_frames", setup.latent_frames, 1, MAX_LATENT_FRAMES, setup.sample_format)
    last = setup.latent_frames * SAMPLES_PER_LATENT - 1
    if 0 <= last < MAX_LATENT_FRAMES * SAMPLES_PER_LATENT:
        checks.number("setup.first_frame", setup.first_frame, 0, last)
        if setup.HasField("frame_count"):
            checks.number("setup.frame_count", setup.frame_count, 1, last + 1 - min(setup.first_frame, last))
    checks.finish()
    return setup


def wanted_frames(setup: DecodeSetup) -> range:
    """Return the audio frames that a setup asks for."""
    end = setup.latent_frames * SAMPLES_PER_LATENT
    return range(setup.first_frame, setup.first_frame + setup.frame_count if setup.HasField("frame_count") else end)


async def read_encode_setup(requests: AsyncIterator[EncodeRequest]) -> EncodeSetup:
    """Await the first message's setup; raises InvalidRequestError naming every bad field."""
    setup = (await read_first(requests)).setup
    longest = MAX_LATENT_FRAMES * SAMPLES_PER_LATENT
    _check_setup("frame_count", setup.frame_count, SAMPLES_PER_LATENT, longest, setup.sample_format).finish()
    return setup


async def read_audio(requests: AsyncIterator[EncodeRequest], setup: EncodeSetup) -> AsyncIterator[NDArray[np.float32]]:
    """Yield runs of samples [n, 2] up to the setup's length; raises InvalidRequestError."""
    place = Place("audio", "setup.frame_count", setup.frame_count)
    async for request in requests:
        place.check_part(request)
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


def _check_setup(field: str, length: int, shortest: int, longest: int, sample_format: SampleFormat.ValueType) -> Checks:
    checks = Checks()
    checks.number(f"setup.{field}", length, shortest, longest)
    if sample_format not in SAMPLE_FORMATS:
        known = ", ".join(SampleFormat.Name(value) for value in sorted(SAMPLE_FORMATS))
        checks.refuse("setup.sample_format", f"is {sample_format}; must be one of {known}")
    return checks


def _check_size(chunk: AudioChunk, sample_format: SampleFormat.ValueType) -> list[Violation]:
    violations: list[Violation] = []
    if chunk.frame_count == 0:
        violations.append(Violation(field="audio.frame_count", description="is 0; must be at least 1"))
    size_bytes = chunk.frame_count * frame_size_bytes(sample_format)
    if len(chunk.data) != size_bytes:
        description = f"holds {len(chunk.data)} bytes; {chunk.frame_count} stereo frames take {size_bytes}"
        violations.append(Violation(field="audio.data", description=description))
    return violations
