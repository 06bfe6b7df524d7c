"""DitService: requests in, songs denoised, progress and latents out."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from soundstage.stage.v1.dit_service_pb2 import DESCRIPTOR, DenoiseProgress, DenoiseRequest, DenoiseResponse
from soundstage.stage.v1.dit_service_pb2_grpc import (
    DitServiceServicer,
    DitServiceStub,
    add_DitServiceServicer_to_server,
)
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.tensor_pb2 import DATA_TYPE_FLOAT32
from soundstage_dit.song import Song, read_song
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import check_fingerprint
from soundstage_runtime.score import INSTRUMENTAL
from soundstage_runtime.serve import Service
from soundstage_runtime.stage import offer_stage
from soundstage_runtime.tensors import latent_chunks


class Denoiser(Protocol):
    """Makes the latents of songs."""

    @property
    def model_fingerprint(self) -> str:
        """Name the loaded model."""
        ...

    def denoise(self, song: Song) -> AsyncGenerator[int | NDArray[np.float32]]:
        """Yield the number of each step done, from 1, and then the latents [frames, 64]."""
        ...


class DitServicer(DitServiceServicer):
    """Answers Denoise, as many at once as `admission` lets in."""

    def __init__(self, denoiser: Denoiser, admission: Admission) -> None:
        self._denoiser = denoiser
        self._admission = admission

    async def Denoise(
        self, request: DenoiseRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[DenoiseResponse]:
        """See dit_service.proto."""
        song = read_song(request)
        check_fingerprint(request.model_fingerprint, self._denoiser.model_fingerprint)
        async with self._admission.enter(), aclosing(self._denoiser.denoise(song)) as events:
            async for event in events:
                if isinstance(event, int):
                    yield DenoiseResponse(progress=DenoiseProgress(step=event, steps=song.steps))
                else:
                    for chunk in latent_chunks(event, DATA_TYPE_FLOAT32):
                        yield DenoiseResponse(latents=chunk)


def offer(denoiser: Denoiser, *, model: StageModel, device: str, admission: Admission) -> list[Service]:
    """Offer a denoiser as DitService and StageService."""
    dit = DitServicer(denoiser, admission)
    service = Service(
        name=DESCRIPTOR.services_by_name["DitService"].full_name,
        add=lambda server: add_DitServiceServicer_to_server(dit, server),
    )
    return offer_stage("dit", service, model=model, device=device, admission=admission)


async def warm_up(channel: grpc.aio.Channel) -> None:
    """Make a song of one code and one step through the channel."""
    request = DenoiseRequest(
        caption="silence",
        lyrics=INSTRUMENTAL,
        codes=[0],
        latent_frames=5,
        options=DiffusionOptions(steps=1),
    )
    async for _ in DitServiceStub(channel).Denoise(request):
        pass
