"""DitService: requests in, songs denoised, progress and latents out."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from soundstage.stage.v1.dit_service_pb2 import (
    DESCRIPTOR,
    Adapter,
    AlignRequest,
    AlignResponse,
    DenoiseDone,
    DenoiseProgress,
    DenoiseQueued,
    DenoiseRequest,
    DenoiseResponse,
    DenoiseSetup,
    ListAdaptersRequest,
    ListAdaptersResponse,
    LoadAdapterRequest,
    LoadAdapterResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizeSetup,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
)
from soundstage.stage.v1.dit_service_pb2_grpc import (
    DitServiceServicer,
    DitServiceStub,
    add_DitServiceServicer_to_server,
)
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import LyricLine
from soundstage.type.v1.tensor_pb2 import DATA_TYPE_FLOAT32
from soundstage_dit.adapter_card import AdapterCard
from soundstage_dit.alignment import Alignment
from soundstage_dit.handles import MAX_KEPT_BYTES, Keepsake, Keepsakes
from soundstage_dit.request import read_song
from soundstage_dit.scheduler import Queued
from soundstage_dit.song import Latents, Song
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import ModelMismatchError
from soundstage_runtime.request_stream import Announced, patient, read_first, read_latents, read_parts
from soundstage_runtime.score import (
    DURATION_RANGE_S,
    INSTRUMENTAL,
    LATENT_CHANNELS,
    MAX_LATENT_FRAMES,
    REFERENCE_LATENTS,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_LATENT,
)
from soundstage_runtime.serve import Service
from soundstage_runtime.stage import offer_stage
from soundstage_runtime.tensors import latent_chunks
from soundstage_runtime.validation import Checks

if TYPE_CHECKING:
    from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceAsyncStub
    from soundstage_dit.adapters import Loan

_ADAPTER_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class SongModel(Protocol):
    """Makes the latents of songs, and the codes of latents."""

    def denoise(self, song: Song, adapters: "Loan") -> AsyncGenerator[int | Queued | Latents]:
        """Yield where the song waits, the number of each step done, from 1, and then the latents [frames, 64]."""
        ...

    def tokenize(self, latents: AsyncIterator[Latents], model: str) -> AsyncGenerator[NDArray[np.int64]]:
        """Yield the codes [codes] of latents [frames, 64] that come in runs; each in order."""
        ...

    async def align(self, song: Song, latents: Latents, adapters: "Loan") -> Alignment:
        """Tell when the lyrics of a song are sung in its latents [frames, 64]."""
        ...


class AdapterShelf(Protocol):
    """Keeps the adapters that songs can be made with."""

    def cards(self) -> Sequence[AdapterCard]:
        """Tell what is loaded, by name."""
        ...

    async def load(self, name: str, path: str, model_fingerprint: str) -> AdapterCard:
        """Load the adapter at `path`, below the directory of adapters, for a model."""
        ...

    def find(self, uses: Sequence[tuple[str, float]], model_fingerprint: str) -> "Loan":
        """Find the adapters of a song, each a name and a scale."""
        ...

    def unload(self, name: str) -> None:
        """Forget an adapter, but for songs that have it already."""
        ...


class DitServicer(DitServiceServicer):
    """Answers Denoise, Tokenize and Align, as many at once as `admission` lets in, and keeps adapters."""

    def __init__(
        self,
        model: SongModel,
        admission: Admission,
        *,
        adapters: AdapterShelf,
        models: Sequence[StageModel],
        max_duration_s: int = int(DURATION_RANGE_S[1]),
        max_kept_bytes: int = MAX_KEPT_BYTES,
        idle_timeout_s: float = 30.0,
    ) -> None:
        """The first of `models` is the default one; songs that were made are kept in `max_kept_bytes`.

        A caller that sends nothing for `idle_timeout_s` while it is waited for loses its call and its place.
        """
        self._model = model
        self._models = models
        self._admission = admission
        self._adapters = adapters
        self._idle_timeout_s = idle_timeout_s
        self._max_frames = max_duration_s * SAMPLE_RATE_HZ // SAMPLES_PER_LATENT
        self._keepsakes = Keepsakes(max_kept_bytes)

    async def Denoise(
        self, request_iterator: AsyncIterator[DenoiseRequest], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[DenoiseResponse]:
        """See dit_service.proto."""
        requests = patient(request_iterator, timeout_s=self._idle_timeout_s)
        setup = (await read_first(requests)).setup
        model = self._choose(setup.model_fingerprint)
        song = read_song(setup, variant=model.variant, max_frames=self._max_frames)
        song = replace(song, model=model.model_fingerprint)
        adapters = self._adapters.find(song.adapters, song.model)
        song = await _read_sources(song, setup, requests)
        handle = ""
        async with self._admission.enter(), aclosing(self._model.denoise(song, adapters)) as events:
            async for event in events:
                if isinstance(event, Queued):
                    yield DenoiseResponse(queued=DenoiseQueued(position=event.position, wait_s=event.wait_s))
                elif isinstance(event, int):
                    yield DenoiseResponse(progress=DenoiseProgress(step=event, steps=song.diffusion.steps))
                else:
                    handle = self._keepsakes.keep(Keepsake(song=song, latents=event, adapters=adapters))
                    for chunk in latent_chunks(event, DATA_TYPE_FLOAT32):
                        yield DenoiseResponse(latents=chunk)
        yield DenoiseResponse(done=DenoiseDone(handle=handle))

    async def Tokenize(
        self, request_iterator: AsyncIterator[TokenizeRequest], context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> TokenizeResponse:
        """See dit_service.proto."""
        requests = patient(request_iterator, timeout_s=self._idle_timeout_s)
        setup = (await read_first(requests)).setup
        checks = Checks()
        checks.number("setup.latent_frames", setup.latent_frames, 1, MAX_LATENT_FRAMES)
        checks.finish()
        model = self._choose(setup.model_fingerprint)
        response = TokenizeResponse()
        latents = read_latents(requests, setup.latent_frames)
        async with (
            self._admission.enter(),
            aclosing(self._model.tokenize(latents, model.model_fingerprint)) as pieces,
        ):
            async for codes in pieces:
                response.codes.extend(codes.tolist())
        return response

    async def Align(self, request: AlignRequest, context: "grpc.aio.ServicerContext[Any, Any]") -> AlignResponse:
        """See dit_service.proto."""
        keepsake = self._keepsakes.find(request.handle)
        async with self._admission.enter():
            alignment = await self._model.align(keepsake.song, keepsake.latents, keepsake.adapters)
        lines = [LyricLine(text=line.text, start_s=line.start_s, end_s=line.end_s) for line in alignment.lines]
        return AlignResponse(lines=lines, score=alignment.score, plan_score=alignment.plan_score)

    async def ListAdapters(
        self, request: ListAdaptersRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> ListAdaptersResponse:
        """See dit_service.proto."""
        return ListAdaptersResponse(adapters=map(_to_proto, self._adapters.cards()))

    async def LoadAdapter(
        self, request: LoadAdapterRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> LoadAdapterResponse:
        """See dit_service.proto."""
        checks = Checks()
        if not _ADAPTER_NAME.fullmatch(request.name):
            wanted = "1 to 64 letters, digits, hyphens, underscores and dots"
            checks.refuse("name", f"is {request.name[:80]!r}; must be {wanted}")
        if not request.path:
            checks.refuse("path", "is empty; must be a file or directory below the stage's adapter directory")
        model = self._models[0]
        if request.model:
            named = [one for one in self._models if request.model in (one.name, one.model_fingerprint)]
            if named:
                model = named[0]
            else:
                names = " or ".join(one.name for one in self._models)
                checks.refuse("model", f"is {request.model[:80]!r}; must be {names}, a fingerprint, or empty")
        checks.finish()
        card = await self._adapters.load(request.name, request.path, model.model_fingerprint)
        return LoadAdapterResponse(adapter=_to_proto(card))

    async def UnloadAdapter(
        self, request: UnloadAdapterRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> UnloadAdapterResponse:
        """See dit_service.proto."""
        self._adapters.unload(request.name)
        return UnloadAdapterResponse()

    def _choose(self, fingerprint: str) -> StageModel:
        """Return the model of a fingerprint, the first for none; raises ModelMismatchError."""
        for model in self._models:
            if fingerprint in ("", model.model_fingerprint):
                return model
        served = ", ".join(f"{model.model_fingerprint} ({model.name})" for model in self._models)
        raise ModelMismatchError(
            f"model_fingerprint is {fingerprint[:80]!r}, and served are: {served}; ask StageService.Describe",
            metadata={
                "wanted": fingerprint[:80],
                "loaded": ",".join(model.model_fingerprint for model in self._models),
            },
        )


def _to_proto(card: AdapterCard) -> Adapter:
    return Adapter(
        name=card.name,
        kind=card.kind,
        rank=card.rank,
        size_bytes=card.size_bytes,
        model_fingerprint=card.model_fingerprint,
    )


async def _read_sources(song: Song, setup: DenoiseSetup, requests: AsyncIterator[DenoiseRequest]) -> Song:
    """Add the source and the references that follow a setup."""
    source_part = Announced(name="source", num_frames=setup.source_frames, length_field="setup.source_frames")
    reference_part = Announced(
        name="reference",
        num_frames=setup.reference_count * REFERENCE_LATENTS,
        length_field=f"setup.reference_count x {REFERENCE_LATENTS}",
    )
    source, references = await read_parts(requests, [source_part, reference_part])
    return replace(
        song,
        source=source if setup.source_frames else None,
        references=tuple(references.reshape(setup.reference_count, REFERENCE_LATENTS, LATENT_CHANNELS)),
    )


def offer(
    songs: SongModel,
    adapters: AdapterShelf,
    *,
    models: Sequence[StageModel],
    device: str,
    admission: Admission,
    max_duration_s: int = int(DURATION_RANGE_S[1]),
    max_kept_bytes: int = MAX_KEPT_BYTES,
) -> list[Service]:
    """Offer models and their adapters as DitService and StageService."""
    dit = DitServicer(
        songs,
        admission,
        adapters=adapters,
        models=models,
        max_duration_s=max_duration_s,
        max_kept_bytes=max_kept_bytes,
    )
    service = Service(
        name=DESCRIPTOR.services_by_name["DitService"].full_name,
        add=lambda server: add_DitServiceServicer_to_server(dit, server),
    )
    return offer_stage("dit", service, models=models, device=device, admission=admission, max_duration_s=max_duration_s)


async def warm_up(channel: grpc.aio.Channel, models: Sequence[StageModel]) -> None:
    """Make a song of one code and one step with each model, the default one last, and tokenize it."""
    dit = DitServiceStub(channel)
    for model in reversed(models):
        await _make_and_tokenize(dit, model.model_fingerprint)


async def _make_and_tokenize(dit: "DitServiceAsyncStub", model_fingerprint: str) -> None:
    setup = DenoiseSetup(
        model_fingerprint=model_fingerprint,
        caption="silence",
        lyrics=INSTRUMENTAL,
        codes=[0],
        latent_frames=5,
        options=DiffusionOptions(steps=1),
    )
    announced = TokenizeSetup(latent_frames=setup.latent_frames, model_fingerprint=model_fingerprint)
    parts = [TokenizeRequest(setup=announced)]
    async for response in dit.Denoise(iter([DenoiseRequest(setup=setup)])):
        if response.HasField("latents"):
            parts.append(TokenizeRequest(latents=response.latents))
    await dit.Tokenize(iter(parts))
