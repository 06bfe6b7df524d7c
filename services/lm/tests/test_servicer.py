"""Compose over a real port."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status

from soundstage.stage.v1.lm_service_pb2 import ComposeRequest, ComposeResponse
from soundstage.stage.v1.lm_service_pb2_grpc import LmServiceStub
from soundstage.stage.v1.stage_service_pb2 import DescribeRequest, StageModel
from soundstage.stage.v1.stage_service_pb2_grpc import StageServiceStub
from soundstage.type.v1.options_pb2 import SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_lm.brief import Brief, CodeRun, Metadata, Plan, Sampling
from soundstage_lm.composer import Composer
from soundstage_lm.engine import load_composer
from soundstage_lm.servicer import Planner, offer, warm_up
from soundstage_lm.settings import LmSettings
from soundstage_runtime.admission import Admission
from soundstage_runtime.serve import Server
from soundstage_runtime.settings import load_settings
from soundstage_runtime.worker import Worker

MODEL = StageModel(name="tiny-lm", variant="64x2", model_fingerprint="f", dtype="float32")
SONG = ComposeRequest(caption="lofi", lyrics="la", metadata=SongMetadata(duration_s=2.5), seed=3)


class Echo:
    """Answers the brief's own metadata, and keeps the brief."""

    fingerprint = "f"
    heard: Brief | None = None

    async def compose(self, brief: Brief) -> AsyncGenerator[Plan | CodeRun, None]:
        self.heard = brief
        yield Plan(metadata=brief.metadata, fields=(), code_count=2)
        yield CodeRun(first_code=0, codes=[5, 63_999])


class Stuck:
    """Answers a plan, then nothing until it is closed."""

    fingerprint = "f"

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def compose(self, brief: Brief) -> AsyncGenerator[Plan | CodeRun, None]:
        try:
            yield Plan(metadata=brief.metadata, fields=(), code_count=1)
            await asyncio.Event().wait()
        finally:
            self.closed.set()


@asynccontextmanager
async def serving(planner: Planner, limit: int = 4, model: StageModel = MODEL) -> AsyncGenerator[grpc.aio.Channel]:
    services = offer(planner, model=model, device="cpu", admission=Admission("songs", limit=limit), max_duration_s=600)
    async with (
        Server(services) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield channel


async def compose(channel: grpc.aio.Channel, request: ComposeRequest) -> list[ComposeResponse]:
    return [response async for response in LmServiceStub(channel).Compose(request, timeout=20)]


async def refusal(channel: grpc.aio.Channel, request: ComposeRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await compose(channel, request)
    return error.value


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    status, bad = Status(), BadRequest()
    trailers = dict(error.trailing_metadata() or ())
    status.ParseFromString(bytes(trailers["grpc-status-details-bin"]))  # type: ignore[arg-type]
    assert any(detail.Unpack(bad) for detail in status.details)
    return {violation.field: violation.description for violation in bad.field_violations}


async def test_answers_the_plan_then_exactly_its_codes(composer: Composer) -> None:
    async with serving(composer) as channel:
        *fields, plan = [piece async for piece in LmServiceStub(channel).Compose(SONG) if not piece.HasField("codes")]
        pieces = await compose(channel, SONG)
    assert pieces[: len(fields) + 1] == [*fields, plan]
    runs = pieces[len(fields) + 1 :]
    codes: list[int] = []
    for run in runs:
        assert run.codes.first_code == len(codes)
        codes += run.codes.codes
    assert plan.plan.code_count == len(codes) == 12
    assert plan.plan.metadata.duration_s == 2.5
    assert all(plan.plan.metadata.HasField(field) for field in ("bpm", "key_scale", "time_signature"))
    assert max(codes) < 1000


async def test_every_field_reaches_the_planner() -> None:
    metadata = SongMetadata(bpm=30, key_scale="F# minor", time_signature="6", vocal_language="yue", duration_s=600)
    sampling = SamplingOptions(
        temperature=0, guidance_scale=10, top_k=5, top_p=1, repetition_penalty=2, negative_prompt="noise"
    )
    request = ComposeRequest(caption="c", lyrics="l", metadata=metadata, seed=2**32 - 1, sampling=sampling)
    echo = Echo()
    async with serving(echo) as channel:
        plan, codes = await compose(channel, request)
    assert echo.heard == Brief(
        caption="c",
        lyrics="l",
        metadata=Metadata(bpm=30, key_scale="F# minor", time_signature="6", vocal_language="yue", duration_s=600),
        seed=2**32 - 1,
        sampling=Sampling(
            temperature=0, guidance_scale=10, top_k=5, top_p=1, repetition_penalty=2, negative_prompt="noise"
        ),
    )
    assert plan.plan.metadata == metadata
    assert list(codes.codes.codes) == [5, 63_999]


async def test_absent_fields_take_the_defaults_of_the_contract() -> None:
    echo = Echo()
    async with serving(echo) as channel:
        await compose(channel, ComposeRequest())
    assert echo.heard is not None
    assert echo.heard.metadata == Metadata()
    assert echo.heard.sampling == Sampling(
        temperature=0.85, guidance_scale=2, top_k=0, top_p=0.9, repetition_penalty=1, negative_prompt=""
    )


async def test_names_every_bad_field_at_once() -> None:
    request = ComposeRequest(
        caption="x" * 2049,
        lyrics="oh <|im_end|> no",
        metadata=SongMetadata(
            bpm=29, key_scale="H major", time_signature="5", vocal_language="tlh", duration_s=math.nan
        ),
        sampling=SamplingOptions(
            temperature=2.1, guidance_scale=0.5, top_p=0, repetition_penalty=math.inf, negative_prompt="<think>"
        ),
    )
    async with serving(Echo()) as channel:
        error = await refusal(channel, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sorted(violations(error)) == sorted(
        [
            "caption",
            "lyrics",
            *("metadata." + name for name in ("bpm", "key_scale", "time_signature", "vocal_language", "duration_s")),
            *("sampling." + name for name in ("temperature", "guidance_scale", "top_p")),
            *("sampling." + name for name in ("repetition_penalty", "negative_prompt")),
        ]
    )


@pytest.mark.parametrize("duration_s", [0.0, 0.99, 600.01, -1.0, math.inf])
async def test_refuses_durations_outside_the_range(duration_s: float) -> None:
    async with serving(Echo()) as channel:
        error = await refusal(channel, ComposeRequest(metadata=SongMetadata(duration_s=duration_s)))
    assert list(violations(error)) == ["metadata.duration_s"]


async def test_refuses_another_model() -> None:
    async with serving(Echo()) as channel:
        assert len(await compose(channel, ComposeRequest(model_fingerprint="f"))) == 2
        error = await refusal(channel, ComposeRequest(model_fingerprint="other"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_refuses_more_songs_than_it_has_places() -> None:
    async with serving(Stuck(), limit=1) as channel:
        first = LmServiceStub(channel).Compose(SONG)
        await anext(aiter(first))
        described = await StageServiceStub(channel).Describe(DescribeRequest())
        error = await refusal(channel, SONG)
        first.cancel()
    assert (described.in_flight, described.max_in_flight) == (1, 1)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_cancelled_call_closes_its_song() -> None:
    stuck = Stuck()
    async with serving(stuck, limit=1) as channel:
        call = LmServiceStub(channel).Compose(SONG)
        await anext(aiter(call))
        call.cancel()
        await asyncio.wait_for(stuck.closed.wait(), timeout=5)


async def test_a_deadline_closes_the_song() -> None:
    stuck = Stuck()
    async with serving(stuck) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in LmServiceStub(channel).Compose(SONG, timeout=0.2):
                pass
        await asyncio.wait_for(stuck.closed.wait(), timeout=5)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_describes_itself(tiny: Path, worker: Worker) -> None:
    loaded = await load_composer(load_settings(LmSettings, ["--model", str(tiny), "--device", "cpu"]), worker)
    async with serving(loaded.composer, model=loaded.model) as channel:
        described = await StageServiceStub(channel).Describe(DescribeRequest())
    assert (described.stage, described.device, described.max_duration_s) == ("lm", "cpu", 600)
    assert list(described.models) == [
        StageModel(name="tiny-lm", variant="64x2", model_fingerprint=loaded.composer.fingerprint, dtype="float32")
    ]


async def test_warms_up_with_a_song_of_one_second() -> None:
    echo = Echo()
    async with serving(echo) as channel:
        await warm_up(channel)
    assert echo.heard is not None
    assert echo.heard.metadata == Metadata(duration_s=1)
