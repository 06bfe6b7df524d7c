"""AudioService: files in, assets kept."""

import hashlib
import tempfile
import time
from collections.abc import AsyncIterator
from typing import Any, BinaryIO, Final

import grpc.aio

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest, UploadAudioResponse
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceServicer
from soundstage_gateway.assets import Assets
from soundstage_gateway.audio_decoder import AudioDecoder
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.request_stream import CallerStalledError, patient
from soundstage_runtime.score import SAMPLE_RATE_HZ

MAX_MESSAGE_BYTES: Final = 1 << 20
MAX_FILE_BYTES: Final = 256 << 20
_LEAST_BYTES_PER_S: Final = 16_000


class AudioServicer(AudioServiceServicer):
    """Takes in as many files at once as `admission` lets in, and decodes one after another.

    A client that sends nothing for `idle_timeout_s`, or is later by that than a slow line would be, loses its call and
    its place.
    """

    def __init__(self, assets: Assets, admission: Admission, *, idle_timeout_s: float = 30.0) -> None:
        self._assets = assets
        self._admission = admission
        self._decoder = AudioDecoder()
        self._idle_timeout_s = idle_timeout_s

    async def UploadAudio(
        self, request_iterator: AsyncIterator[UploadAudioRequest], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> UploadAudioResponse:
        """See audio_service.proto."""
        async with self._admission.enter():
            with tempfile.TemporaryFile() as file:
                sha256 = await _receive(request_iterator, file, idle_timeout_s=self._idle_timeout_s)
                name = f"assets/{sha256.hex()[:32]}"
                recording = self._assets.find(name)
                if recording is None:
                    recording = await self._decoder.decode(file)
            self._assets.keep(name, recording)
        return UploadAudioResponse(
            asset=name,
            duration_s=len(recording.samples) / SAMPLE_RATE_HZ,
            sample_rate_hz=recording.sample_rate_hz,
            channels=recording.channels,
            sha256=sha256,
        )


async def _receive(requests: AsyncIterator[UploadAudioRequest], file: BinaryIO, *, idle_timeout_s: float) -> bytes:
    """Write a stream into a file, and return its SHA-256; raises InvalidRequestError, CallerStalledError."""
    digest = hashlib.sha256()
    size_bytes = 0
    begun_s = time.monotonic()
    async for request in patient(requests, timeout_s=idle_timeout_s):
        size_bytes += len(request.data)
        took_s = time.monotonic() - begun_s
        if took_s > idle_timeout_s + size_bytes / _LEAST_BYTES_PER_S:
            raise CallerStalledError(
                f"{size_bytes} bytes came in {took_s:.0f} s; send {_LEAST_BYTES_PER_S} a second at the least"
            )
        if len(request.data) > MAX_MESSAGE_BYTES:
            _refuse(f"holds {len(request.data)} bytes; send at most {MAX_MESSAGE_BYTES} in a message")
        if size_bytes > MAX_FILE_BYTES:
            _refuse(f"is more than {MAX_FILE_BYTES} bytes in all; send a shorter file, or a compressed one")
        digest.update(request.data)
        file.write(request.data)
    if not size_bytes:
        _refuse("is empty; send the bytes of an audio file")
    return digest.digest()


def _refuse(description: str) -> None:
    raise InvalidRequestError([Violation(field="data", description=description)])
