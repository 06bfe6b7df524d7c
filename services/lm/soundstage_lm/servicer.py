"""LmService: wire in, planner, wire out."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Protocol

import grpc.aio

from soundstage.stage.v1.lm_service_pb2 import (
    DESCRIPTOR,
    CodeChunk,
    ComposePlan,
    ComposeRequest,
    ComposeResponse,
    DraftRequest,
    DraftResponse,
    PolishRequest,
    PolishResponse,
    ScoreRequest,
    ScoreResponse,
    UnderstandRequest,
    UnderstandResponse,
)
from soundstage.stage.v1.lm_service_pb2_grpc import (
    LmServiceServicer,
    LmServiceStub,
    add_LmServiceServicer_to_server,
)
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.type.v1.score_pb2 import ORIGIN_LM, ORIGIN_USER, LikelihoodPart, PlanField, SongMetadata, SongText
from soundstage.type.v1.score_pb2 import Likelihood as LikelihoodMessage
from soundstage_lm.brief import Brief, Claim, CodeRun, Field, Idea, Likelihood, Listening, Metadata, Plan, Rough, Song
from soundstage_lm.request import read_compose, read_draft, read_polish, read_score, read_understand
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import check_fingerprint
from soundstage_runtime.serve import Service
from soundstage_runtime.stage import offer_stage


class Planner(Protocol):
    """Plans one song: fields, a plan, then its codes in order. Writes the texts of songs."""

    fingerprint: str

    def compose(self, brief: Brief) -> AsyncGenerator[Field | Plan | CodeRun, None]: ...

    async def understand(self, listening: Listening) -> Song: ...

    async def draft(self, idea: Idea) -> Song: ...

    async def polish(self, rough: Rough) -> Song: ...

    async def score(self, claim: Claim) -> Likelihood: ...


class LmServicer(LmServiceServicer):
    """Answers with a planner, a bounded number of songs at once."""

    def __init__(self, planner: Planner, *, admission: Admission, max_duration_s: float) -> None:
        self._planner = planner
        self._admission = admission
        self._max_duration_s = max_duration_s

    async def Compose(
        self, request: ComposeRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[ComposeResponse]:
        """See lm_service.proto."""
        brief = read_compose(request, max_duration_s=self._max_duration_s)
        async with self._enter(request.model_fingerprint), aclosing(self._planner.compose(brief)) as pieces:
            async for piece in pieces:
                yield _write(piece)

    async def Understand(
        self, request: UnderstandRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> UnderstandResponse:
        """See lm_service.proto."""
        listening = read_understand(request, max_duration_s=self._max_duration_s)
        async with self._enter(request.model_fingerprint):
            return UnderstandResponse(text=_write_song(await self._planner.understand(listening)))

    async def Draft(self, request: DraftRequest, context: "grpc.aio.ServicerContext[Any, Any]") -> DraftResponse:
        """See lm_service.proto."""
        idea = read_draft(request)
        async with self._enter(request.model_fingerprint):
            return DraftResponse(text=_write_song(await self._planner.draft(idea)))

    async def Polish(self, request: PolishRequest, context: "grpc.aio.ServicerContext[Any, Any]") -> PolishResponse:
        """See lm_service.proto."""
        rough = read_polish(request, max_duration_s=self._max_duration_s)
        async with self._enter(request.model_fingerprint):
            return PolishResponse(text=_write_song(await self._planner.polish(rough)))

    async def Score(self, request: ScoreRequest, context: "grpc.aio.ServicerContext[Any, Any]") -> ScoreResponse:
        """See lm_service.proto."""
        claim = read_score(request, max_duration_s=self._max_duration_s)
        async with self._enter(request.model_fingerprint):
            likelihood = await self._planner.score(claim)
        parts = [LikelihoodPart(name=name, score=score) for name, score in likelihood.parts.items()]
        return ScoreResponse(likelihood=LikelihoodMessage(total=likelihood.total, parts=parts))

    def _enter(self, fingerprint: str) -> AbstractAsyncContextManager[None]:
        check_fingerprint(fingerprint, self._planner.fingerprint)
        return self._admission.enter()


def offer(
    planner: Planner, *, model: StageModel, device: str, admission: Admission, max_duration_s: float
) -> list[Service]:
    """Offer a planner as LmService and StageService."""
    lm = LmServicer(planner, admission=admission, max_duration_s=max_duration_s)
    service = Service(
        name=DESCRIPTOR.services_by_name["LmService"].full_name,
        add=lambda server: add_LmServiceServicer_to_server(lm, server),
    )
    return offer_stage("lm", service, models=[model], device=device, admission=admission, max_duration_s=max_duration_s)


async def warm_up(channel: grpc.aio.Channel) -> None:
    """Plan a second of music, metadata included, through the real port."""
    request = ComposeRequest(caption="warm-up", metadata=SongMetadata(duration_s=1))
    async for _ in LmServiceStub(channel).Compose(request):
        pass


def _write(piece: Field | Plan | CodeRun) -> ComposeResponse:
    match piece:
        case Field():
            return ComposeResponse(field=_write_field(piece))
        case Plan():
            plan = ComposePlan(
                metadata=_write_metadata(piece.metadata),
                code_count=piece.code_count,
                caption=piece.metadata.caption or "",
                fields=map(_write_field, piece.fields),
            )
            return ComposeResponse(plan=plan)
        case CodeRun():
            return ComposeResponse(codes=CodeChunk(first_code=piece.first_code, codes=piece.codes))


def _write_field(field: Field) -> PlanField:
    return PlanField(name=field.name, value=field.value, origin=ORIGIN_USER if field.is_given else ORIGIN_LM)


def _write_song(song: Song) -> SongText:
    return SongText(
        caption=song.metadata.caption or "",
        lyrics=song.lyrics,
        metadata=_write_metadata(song.metadata),
        genres=song.metadata.genres or "",
    )


def _write_metadata(metadata: Metadata) -> SongMetadata:
    return SongMetadata(
        bpm=metadata.bpm,
        key_scale=metadata.key_scale,
        time_signature=metadata.time_signature,
        vocal_language=metadata.vocal_language,
        duration_s=metadata.duration_s,
    )
