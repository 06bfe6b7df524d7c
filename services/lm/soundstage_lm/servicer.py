"""LmService: wire in, planner, wire out."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

import grpc.aio

from soundstage.stage.v1.lm_service_pb2 import DESCRIPTOR, CodeChunk, ComposePlan, ComposeRequest, ComposeResponse
from soundstage.stage.v1.lm_service_pb2_grpc import (
    LmServiceServicer,
    LmServiceStub,
    add_LmServiceServicer_to_server,
)
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_lm.brief import Brief, CodeRun, Metadata, Plan
from soundstage_lm.request import read_request
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import check_fingerprint
from soundstage_runtime.serve import Service
from soundstage_runtime.stage import offer_stage


class Planner(Protocol):
    """Plans one song: a plan, then its codes in order."""

    fingerprint: str

    def compose(self, brief: Brief) -> AsyncGenerator[Plan | CodeRun, None]: ...


class LmServicer(LmServiceServicer):
    """Answers Compose with a planner, a bounded number of songs at once."""

    def __init__(self, planner: Planner, *, admission: Admission, max_duration_s: float) -> None:
        self._planner = planner
        self._admission = admission
        self._max_duration_s = max_duration_s

    async def Compose(
        self, request: ComposeRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[ComposeResponse]:
        """See lm_service.proto."""
        brief = read_request(request, max_duration_s=self._max_duration_s)
        check_fingerprint(request.model_fingerprint, self._planner.fingerprint)
        async with self._admission.enter(), aclosing(self._planner.compose(brief)) as pieces:
            async for piece in pieces:
                yield _write(piece)


def offer(
    planner: Planner, *, model: StageModel, device: str, admission: Admission, max_duration_s: float
) -> list[Service]:
    """Offer a planner as LmService and StageService."""
    lm = LmServicer(planner, admission=admission, max_duration_s=max_duration_s)
    service = Service(
        name=DESCRIPTOR.services_by_name["LmService"].full_name,
        add=lambda server: add_LmServiceServicer_to_server(lm, server),
    )
    return offer_stage("lm", service, model=model, device=device, admission=admission, max_duration_s=max_duration_s)


async def warm_up(channel: grpc.aio.Channel) -> None:
    """Plan a second of music, metadata included, through the real port."""
    request = ComposeRequest(caption="warm-up", metadata=SongMetadata(duration_s=1))
    async for _ in LmServiceStub(channel).Compose(request):
        pass


def _write(piece: Plan | CodeRun) -> ComposeResponse:
    if isinstance(piece, Plan):
        return ComposeResponse(plan=ComposePlan(metadata=_write_metadata(piece.metadata), code_count=piece.code_count))
    return ComposeResponse(codes=CodeChunk(first_code=piece.first_code, codes=piece.codes))


def _write_metadata(metadata: Metadata) -> SongMetadata:
    return SongMetadata(
        bpm=metadata.bpm,
        key_scale=metadata.key_scale,
        time_signature=metadata.time_signature,
        vocal_language=metadata.vocal_language,
        duration_s=metadata.duration_s,
    )
