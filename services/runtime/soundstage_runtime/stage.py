"""StageService: what a stage says of itself, and its admission."""

from collections.abc import Sequence
from typing import Any

import grpc.aio

from soundstage.stage.v1.stage_service_pb2 import DESCRIPTOR, DescribeRequest, DescribeResponse, StageModel
from soundstage.stage.v1.stage_service_pb2_grpc import StageServiceServicer, add_StageServiceServicer_to_server
from soundstage_runtime.admission import Admission
from soundstage_runtime.score import DURATION_RANGE_S
from soundstage_runtime.serve import Service


class StageServicer(StageServiceServicer):
    """Answers Describe from values fixed at start and the live count of calls."""

    def __init__(
        self,
        stage: str,
        *,
        models: Sequence[StageModel],
        device: str,
        admission: Admission,
        max_duration_s: float = DURATION_RANGE_S[1],
    ) -> None:
        self._fixed = DescribeResponse(
            stage=stage,
            models=models,
            device=device,
            max_in_flight=admission.limit,
            max_duration_s=max_duration_s,
        )
        self._admission = admission

    async def Describe(
        self, request: DescribeRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> DescribeResponse:
        """See stage_service.proto."""
        response = DescribeResponse()
        response.CopyFrom(self._fixed)
        response.in_flight = self._admission.in_flight
        return response


def offer_stage(
    stage: str,
    service: Service,
    *,
    models: Sequence[StageModel],
    device: str,
    admission: Admission,
    max_duration_s: float = DURATION_RANGE_S[1],
) -> list[Service]:
    """A stage's own service and StageService beside it, for a Server."""
    card = StageServicer(stage, models=models, device=device, admission=admission, max_duration_s=max_duration_s)
    return [
        service,
        Service(
            name=DESCRIPTOR.services_by_name["StageService"].full_name,
            add=lambda server: add_StageServiceServicer_to_server(card, server),
        ),
    ]
