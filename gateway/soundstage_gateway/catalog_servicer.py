"""CatalogService: what the stages say of themselves, and the adapters of the diffusion stage."""

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar

import grpc.aio
import structlog

from soundstage.music.v1.catalog_service_pb2 import (
    Adapter,
    GetCapabilitiesRequest,
    GetCapabilitiesResponse,
    ListAdaptersRequest,
    ListAdaptersResponse,
    ListModelsRequest,
    ListModelsResponse,
    LoadAdapterRequest,
    LoadAdapterResponse,
    Model,
    StageState,
    UnloadAdapterRequest,
    UnloadAdapterResponse,
)
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceServicer
from soundstage.music.v1.song_service_pb2 import STAGE_DIT
from soundstage.stage.v1 import dit_service_pb2 as dit
from soundstage.stage.v1.stage_service_pb2 import DescribeResponse
from soundstage.type.v1.audio_pb2 import Encoding, SampleFormat
from soundstage.type.v1.task_pb2 import Task
from soundstage_gateway.audio_format import SAMPLE_RATES_HZ
from soundstage_gateway.order import ADAPTERS, MODELS
from soundstage_gateway.stages import NAMES, Stages, ask_once
from soundstage_runtime.admission import Admission
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.score import (
    DURATION_RANGE_S,
    KEY_SCALES,
    LANGUAGES,
    TIME_SIGNATURES,
)
from soundstage_runtime.validation import Checks
from soundstage_runtime.variant import can_do

_log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]
DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 100
_ADAPTER: Final = re.compile(rf"{ADAPTERS}[A-Za-z0-9._-]{{1,64}}")

T = TypeVar("T")


class _PageRequest(Protocol):
    @property
    def page_size(self) -> int: ...

    @property
    def page_token(self) -> str: ...


class CatalogServicer(CatalogServiceServicer):
    """Says what the stages say of themselves, and passes on what is asked of adapters."""

    def __init__(self, stages: Stages, admission: Admission, *, max_variants: int) -> None:
        self._stages = stages
        self._admission = admission
        self._max_variants = max_variants

    async def GetCapabilities(self, request: GetCapabilitiesRequest, context: Context) -> GetCapabilitiesResponse:
        """See catalog_service.proto."""
        found = await self._describe_all()
        states = [
            StageState(
                stage=stage,
                reachable=description is not None,
                device=description.device if description else "",
                max_in_flight=description.max_in_flight if description else 0,
                in_flight=description.in_flight if description else 0,
            )
            for stage, description in found.items()
        ]
        limits_s = [description.max_duration_s for description in found.values() if description]
        return GetCapabilitiesResponse(
            stages=states,
            max_duration_s=min([DURATION_RANGE_S[1], *limits_s]),
            max_variants=self._max_variants,
            max_songs_in_flight=self._admission.limit,
            songs_in_flight=self._admission.in_flight,
            sample_formats=SampleFormat.values()[1:],
            sample_rates_hz=SAMPLE_RATES_HZ,
            encodings=Encoding.values()[1:],
            vocal_languages=LANGUAGES,
            key_scales=KEY_SCALES,
            time_signatures=TIME_SIGNATURES,
            tasks=_tasks_of(found[STAGE_DIT]),
        )

    async def ListModels(self, request: ListModelsRequest, context: Context) -> ListModelsResponse:
        """See catalog_service.proto."""
        check_page(request)
        models = [
            Model(
                name=f"models/{NAMES[stage]}/{model.name}",
                stage=stage,
                variant=model.variant,
                model_fingerprint=model.model_fingerprint,
                dtype=model.dtype,
            )
            for stage, description in (await self._describe_all()).items()
            if description
            for model in description.models
        ]
        page, next_page_token = _page(models, request)
        return ListModelsResponse(models=page, next_page_token=next_page_token)

    async def ListAdapters(self, request: ListAdaptersRequest, context: Context) -> ListAdaptersResponse:
        """See catalog_service.proto."""
        check_page(request)
        answer = await ask_once(STAGE_DIT, self._stages.dit.ListAdapters, dit.ListAdaptersRequest())
        page, next_page_token = _page([_public(adapter) for adapter in answer.adapters], request)
        return ListAdaptersResponse(adapters=page, next_page_token=next_page_token)

    async def LoadAdapter(self, request: LoadAdapterRequest, context: Context) -> LoadAdapterResponse:
        """See catalog_service.proto."""
        model = request.model.removeprefix(MODELS)
        wanted = dit.LoadAdapterRequest(name=_read_name(request.adapter), path=request.path, model=model)
        answer = await ask_once(STAGE_DIT, self._stages.dit.LoadAdapter, wanted)
        return LoadAdapterResponse(adapter=_public(answer.adapter))

    async def UnloadAdapter(self, request: UnloadAdapterRequest, context: Context) -> UnloadAdapterResponse:
        """See catalog_service.proto."""
        wanted = dit.UnloadAdapterRequest(name=_read_name(request.adapter))
        await ask_once(STAGE_DIT, self._stages.dit.UnloadAdapter, wanted)
        return UnloadAdapterResponse()

    async def _describe_all(self) -> dict[Any, DescribeResponse | None]:
        async def describe(stage: Any) -> DescribeResponse | None:
            try:
                return await self._stages.describe(stage)
            except ServiceError as error:
                _log.warning("stage_unreachable", stage=NAMES[stage], error=error.message)
                return None

        return dict(zip(NAMES, await asyncio.gather(*map(describe, NAMES)), strict=True))


def _tasks_of(description: DescribeResponse | None) -> list[str]:
    """Name the tasks that the diffusion stage's models can do."""
    if description is None:
        return []
    kinds = [field.name for field in Task.DESCRIPTOR.oneofs_by_name["kind"].fields]
    return [kind for kind in kinds if any(can_do(model.variant, kind) for model in description.models)]


def _read_name(name: str) -> str:
    """Return what the stage calls an adapter."""
    checks = Checks()
    if not _ADAPTER.fullmatch(name):
        wanted = f"{ADAPTERS} and 1 to 64 letters, digits, hyphens, underscores and dots"
        checks.refuse("adapter", f"is {name[:80]!r}; must be {wanted}")
    checks.finish()
    return name.removeprefix(ADAPTERS)


def _public(adapter: dit.Adapter) -> Adapter:
    return Adapter(
        name=f"{ADAPTERS}{adapter.name}",
        kind=adapter.kind,
        rank=adapter.rank,
        size_bytes=adapter.size_bytes,
        model_fingerprint=adapter.model_fingerprint,
    )


def check_page(request: _PageRequest) -> None:
    """Refuse a page that cannot be."""
    checks = Checks()
    checks.number("page_size", request.page_size or DEFAULT_PAGE_SIZE, 1, MAX_PAGE_SIZE)
    token = request.page_token
    if token and not (token.isdecimal() and token.isascii() and len(token) < 10):
        checks.refuse("page_token", f"is {token[:40]!r}; give next_page_token of the page before")
    checks.finish()


def _page(found: Sequence[T], request: _PageRequest) -> tuple[Sequence[T], str]:
    """Cut out the page that is asked for; with the token of the next, empty on the last."""
    first = int(request.page_token or 0)
    after = first + (request.page_size or DEFAULT_PAGE_SIZE)
    return found[first:after], str(after) if after < len(found) else ""
