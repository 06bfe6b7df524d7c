"""VaeService: request streams in, codec, response streams out."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.stage.v1.vae_service_pb2 import (
    DESCRIPTOR,
    DecodeRequest,
    DecodeResponse,
    DecodeSetup,
    EncodeRequest,
    EncodeResponse,
    EncodeSetup,
)
from soundstage.stage.v1.vae_service_pb2_grpc import (
    VaeServiceServicer,
    VaeServiceStub,
    add_VaeServiceServicer_to_server,
)
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_S16, AudioChunk
from soundstage.type.v1.tensor_pb2 import DATA_TYPE_FLOAT32
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import check_fingerprint
from soundstage_runtime.pcm import audio_chunks, frame_size_bytes
from soundstage_runtime.request_stream import patient, read_latents
from soundstage_runtime.score import LATENT_CHANNELS, SAMPLES_PER_LATENT
from soundstage_runtime.serve import Service
from soundstage_runtime.stage import offer_stage
from soundstage_runtime.tensors import latent_chunks
from soundstage_vae.requests import read_audio, read_decode_setup, read_encode_setup, wanted_frames

Samples = NDArray[np.float32]  # [n, 2]
Latents = NDArray[np.float32]  # [frames, 64]


class SongCodec(Protocol):
    """Codes whole songs, a piece at a time, in playing order."""

    @property
    def fingerprint(self) -> str:
        """Name the loaded model."""
        ...

    def decode(self, latents: AsyncIterator[Latents], num_frames: int, wanted: range) -> AsyncGenerator[Samples]:
        """Yield the wanted audio frames of a song of `num_frames` latents."""
        ...

    def encode(self, audio: AsyncIterator[Samples], num_samples: int, seed: int | None) -> AsyncGenerator[Latents]:
        """Yield the latents of `num_samples` samples."""
        ...


class VaeServicer(VaeServiceServicer):
    """Answers Decode and Encode, as many at once as `admission` lets in."""

    def __init__(self, codec: SongCodec, admission: Admission, *, idle_timeout_s: float = 30.0) -> None:
        """A caller that sends nothing for `idle_timeout_s` while it is waited for loses its call and its place."""
        self._codec = codec
        self._admission = admission
        self._idle_timeout_s = idle_timeout_s

    async def Decode(
        self, request_iterator: AsyncIterator[DecodeRequest], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[DecodeResponse]:
        """See vae_service.proto."""
        requests = patient(request_iterator, timeout_s=self._idle_timeout_s)
        setup = await read_decode_setup(requests)
        check_fingerprint(setup.model_fingerprint, self._codec.fingerprint)
        async with self._admission.enter():
            latents = read_latents(requests, setup.latent_frames)
            wanted = wanted_frames(setup)
            first_frame = wanted.start
            async with aclosing(self._codec.decode(latents, setup.latent_frames, wanted)) as decoded:
                async for samples in decoded:
                    chunks = audio_chunks(samples, first_frame=first_frame, sample_format=setup.sample_format)
                    for chunk, peak in chunks:
                        yield DecodeResponse(audio=chunk, peak=peak)
                    first_frame += len(samples)
            async for _ in latents:
                pass  # refuses what comes after the last frame

    async def Encode(
        self, request_iterator: AsyncIterator[EncodeRequest], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[EncodeResponse]:
        """See vae_service.proto."""
        requests = patient(request_iterator, timeout_s=self._idle_timeout_s)
        setup = await read_encode_setup(requests)
        check_fingerprint(setup.model_fingerprint, self._codec.fingerprint)
        async with self._admission.enter():
            audio = read_audio(requests, setup)
            seed = setup.seed if setup.HasField("seed") else None
            first_frame = 0
            async with aclosing(self._codec.encode(audio, setup.frame_count, seed)) as encoded:
                async for latents in encoded:
                    for chunk in latent_chunks(latents, DATA_TYPE_FLOAT32):
                        chunk.first_frame += first_frame
                        yield EncodeResponse(latents=chunk)
                    first_frame += len(latents)
            async for _ in audio:
                pass


def offer(codec: SongCodec, *, model: StageModel, device: str, admission: Admission) -> list[Service]:
    """Offer a codec as VaeService and StageService."""
    vae = VaeServicer(codec, admission)
    service = Service(
        name=DESCRIPTOR.services_by_name["VaeService"].full_name,
        add=lambda server: add_VaeServiceServicer_to_server(vae, server),
    )
    return offer_stage("vae", service, models=[model], device=device, admission=admission)


async def warm_up(channel: grpc.aio.Channel, *, latent_frames: int) -> None:
    """Encode a frame of silence and decode so many: kernels of each window's length are chosen now, not in a song."""
    vae = VaeServiceStub(channel)
    silence = AudioChunk(
        frame_count=SAMPLES_PER_LATENT, data=bytes(SAMPLES_PER_LATENT * frame_size_bytes(SAMPLE_FORMAT_S16))
    )
    encoding = EncodeSetup(frame_count=SAMPLES_PER_LATENT)
    async for _ in vae.Encode(iter([EncodeRequest(setup=encoding), EncodeRequest(audio=silence)])):
        pass
    latents = latent_chunks(np.zeros((latent_frames, LATENT_CHANNELS), np.float32), DATA_TYPE_FLOAT32)
    decoding = DecodeRequest(setup=DecodeSetup(latent_frames=latent_frames))
    async for _ in vae.Decode(iter([decoding, *(DecodeRequest(latents=chunk) for chunk in latents)])):
        pass
