"""Compose over a real port."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status

from soundstage.stage.v1.lm_service_pb2 import (
    ComposeRequest,
    ComposeResponse,
    DraftRequest,
    PolishRequest,
    ScoreRequest,
    UnderstandRequest,
)
from soundstage.stage.v1.lm_service_pb2_grpc import LmServiceStub
from soundstage.stage.v1.stage_service_pb2 import DescribeRequest, StageModel
from soundstage.stage.v1.stage_service_pb2_grpc import StageServiceStub
from soundstage.type.v1.options_pb2 import SamplingOptions
from soundstage.type.v1.score_pb2 import ORIGIN_LM, ORIGIN_USER, PlanField, SongMetadata, SongText
from soundstage_lm.brief import (
    Brief,
    Claim,
    CodeRun,
    Field,
    Idea,
    Likelihood,
    Listening,
    Metadata,
    Plan,
    Rough,
    Sampling,
    Song,
)
from soundstage_lm.composer import Composer
from soundstage_lm.engine import load_composer
from soundstage_lm.servicer import Planner, offer, warm_up
from soundstage_lm.settings import LmSettings
from soundstage_runtime.admission import Admission
from soundstage_runtime.serve import Server
from soundstage_runtime.settings import load_settings
from soundstage_runtime.worker import Worker

MODEL = StageModel(name="tiny-lm", variant="64x2", model_fingerprint="f", dtype="float32")
SONG_TEXT = Song(metadata=Metadata(bpm=90, caption="soft", genres="folk", duration_s=2), lyrics="la")
SONG = ComposeRequest(caption="lofi", lyrics="la", metadata=SongMetadata(duration_s=2.5), seed=3)


class Echo:
    """Answers what it is asked, and keeps it."""

    fingerprint = "f"
    heard: Brief | Listening | Idea | Rough | Claim | None = None

    async def compose(self, brief: Brief) -> AsyncGenerator[Field | Plan | CodeRun, None]:
        self.heard = brief
        field = Field(name="caption", value="soft", is_given=False)
        yield field
        plan = replace(field, name="bpm", value="90", is_given=True)
        yield Plan(metadata=replace(brief.metadata, caption="soft"), fields=(plan, field), code_count=2)
        yield CodeRun(first_code=0, codes=[5, 63_999])

    async def understand(self, listening: Listening) -> Song:
        self.heard = listening
        return SONG_TEXT

    async def draft(self, idea: Idea) -> Song:
        self.heard = idea
        return SONG_TEXT

    async def polish(self, rough: Rough) -> Song:
        self.heard = rough
        return SONG_TEXT

    async def score(self, claim: Claim) -> Likelihood:
        self.heard = claim
        return Likelihood(parts={"caption": 0.25, "bpm": 1.0}, total=0.5)


class Stuck(Echo):
    """Answers a plan, then nothing until it is closed; never answers a text."""

    fingerprint = "f"

    def __init__(self) -> None:
        self.begun, self.closed = asyncio.Event(), asyncio.Event()

    async def compose(self, brief: Brief) -> AsyncGenerator[Field | Plan | CodeRun, None]:
        try:
            yield Plan(metadata=brief.metadata, fields=(), code_count=1)
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def draft(self, idea: Idea) -> Song:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.closed.set()
        return SONG_TEXT


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


async def test_a_score_is_asked_for_whole_and_answered_part_by_part() -> None:
    echo = Echo()
    async with serving(echo) as channel:
        request = ScoreRequest(codes=[1, 2], caption=" soft ", metadata=SongMetadata(key_scale="Am"), spread=0.5)
        answer = await LmServiceStub(channel).Score(request)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await LmServiceStub(channel).Score(ScoreRequest(codes=[1], caption="a", model_fingerprint="other"))
    metadata = Metadata(key_scale="A minor")
    assert echo.heard == Claim(codes=(1, 2), caption="soft", lyrics="", metadata=metadata, spread=0.5)
    assert [(part.name, part.score) for part in answer.likelihood.parts] == [("caption", 0.25), ("bpm", 1.0)]
    assert answer.likelihood.total == 0.5
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


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
    request = ComposeRequest(
        caption="c",
        lyrics="l",
        metadata=metadata,
        seed=2**32 - 1,
        sampling=sampling,
        write_codes=False,
        write_metadata=False,
        rewrite_caption=False,
        detect_language=False,
    )
    echo = Echo()
    async with serving(echo) as channel:
        field, plan, codes = await compose(channel, request)
    assert echo.heard == Brief(
        caption="c",
        lyrics="l",
        metadata=Metadata(bpm=30, key_scale="F# minor", time_signature="6", vocal_language="yue", duration_s=600),
        seed=2**32 - 1,
        sampling=Sampling(
            temperature=0, guidance_scale=10, top_k=5, top_p=1, repetition_penalty=2, negative_prompt="noise"
        ),
        write_codes=False,
        write_metadata=False,
        rewrite_caption=False,
        detect_language=False,
    )
    caption = PlanField(name="caption", value="soft", origin=ORIGIN_LM)
    assert field.field == caption
    assert plan.plan.metadata == metadata
    assert plan.plan.caption == "soft"
    assert list(plan.plan.fields) == [PlanField(name="bpm", value="90", origin=ORIGIN_USER), caption]
    assert list(codes.codes.codes) == [5, 63_999]


async def test_absent_fields_take_the_defaults_of_the_contract() -> None:
    echo = Echo()
    async with serving(echo) as channel:
        await compose(channel, ComposeRequest())
    assert isinstance(echo.heard, Brief)
    assert echo.heard.metadata == Metadata()
    assert echo.heard.write_codes
    assert echo.heard.write_metadata
    assert echo.heard.rewrite_caption
    assert echo.heard.detect_language
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


async def test_metadata_are_taken_as_people_write_them() -> None:
    echo = Echo()
    async with serving(echo) as channel:
        metadata = SongMetadata(key_scale="Am", time_signature="6/8", vocal_language="EN")
        await compose(channel, ComposeRequest(metadata=metadata))
        wanted = Metadata(key_scale="A minor", time_signature="6", vocal_language="en")
        assert isinstance(echo.heard, Brief)
        assert echo.heard.metadata == wanted
        await LmServiceStub(channel).Polish(PolishRequest(metadata=metadata))
        assert isinstance(echo.heard, Rough)
        assert echo.heard.metadata == wanted


async def test_writes_the_texts_of_songs() -> None:
    echo = Echo()
    wire = SongText(caption="soft", lyrics="la", genres="folk", metadata=SongMetadata(bpm=90, duration_s=2))
    sampling = SamplingOptions(temperature=0)
    async with serving(echo) as channel:
        lm = LmServiceStub(channel)
        described = await lm.Understand(UnderstandRequest(codes=[1, 2], sampling=sampling, seed=5))
        assert described.text == wire
        assert echo.heard == Listening(codes=(1, 2), seed=5, sampling=Sampling(temperature=0))
        drafted = await lm.Draft(DraftRequest(query="q", instrumental=True, vocal_language="De", seed=6))
        assert drafted.text == wire
        assert echo.heard == Idea(query="q", is_instrumental=True, vocal_language="de", seed=6, sampling=Sampling())
        request = PolishRequest(caption="c", lyrics="l", metadata=SongMetadata(bpm=30), seed=7)
        assert (await lm.Polish(request)).text == wire
        assert echo.heard == Rough(caption="c", lyrics="l", metadata=Metadata(bpm=30), seed=7, sampling=Sampling())


@pytest.mark.parametrize("language", ["", "unknown"])
async def test_an_unknown_language_is_left_to_the_draft(language: str) -> None:
    echo = Echo()
    async with serving(echo) as channel:
        await LmServiceStub(channel).Draft(DraftRequest(vocal_language=language))
    assert isinstance(echo.heard, Idea)
    assert echo.heard.vocal_language is None


async def test_names_every_bad_field_of_the_texts() -> None:
    sampling = SamplingOptions(temperature=3)
    async with serving(Echo()) as channel:
        lm = LmServiceStub(channel)
        for call, fields in (
            (lm.Understand(UnderstandRequest(codes=[1, 64_000], sampling=sampling)), {"codes[1]"}),
            (lm.Understand(UnderstandRequest(sampling=sampling)), {"codes"}),
            (lm.Understand(UnderstandRequest(codes=[0] * 3001, sampling=sampling)), {"codes"}),
            (
                lm.Draft(DraftRequest(query="<think>", vocal_language="tlh", sampling=sampling)),
                {"query", "vocal_language"},
            ),
            (
                lm.Polish(
                    PolishRequest(
                        caption="x" * 2049, lyrics="<|im_end|>", metadata=SongMetadata(bpm=1), sampling=sampling
                    )
                ),
                {"caption", "lyrics", "metadata.bpm"},
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert set(violations(error.value)) == {*fields, "sampling.temperature"}


async def test_a_cancelled_text_is_closed_and_gives_its_place_back() -> None:
    stuck = Stuck()
    async with serving(stuck, limit=1) as channel:
        call = LmServiceStub(channel).Draft(DraftRequest(query="q"))
        await asyncio.wait_for(stuck.begun.wait(), timeout=5)
        refused = await refusal(channel, SONG)
        call.cancel()
        await asyncio.wait_for(stuck.closed.wait(), timeout=5)
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_text_of_another_model_is_refused() -> None:
    async with serving(Echo()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await LmServiceStub(channel).Understand(UnderstandRequest(codes=[1], model_fingerprint="other"))
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_real_model_describes_codes(composer: Composer) -> None:
    async with serving(composer) as channel:
        described = await LmServiceStub(channel).Understand(UnderstandRequest(codes=range(50), seed=1))
    metadata = described.text.metadata
    assert metadata.duration_s == 10
    assert all(metadata.HasField(field) for field in ("bpm", "key_scale", "time_signature", "vocal_language"))


@pytest.mark.parametrize("duration_s", [0.0, 0.99, 600.01, -1.0, math.inf])
async def test_refuses_durations_outside_the_range(duration_s: float) -> None:
    async with serving(Echo()) as channel:
        error = await refusal(channel, ComposeRequest(metadata=SongMetadata(duration_s=duration_s)))
    assert list(violations(error)) == ["metadata.duration_s"]


async def test_refuses_another_model() -> None:
    async with serving(Echo()) as channel:
        assert len(await compose(channel, ComposeRequest(model_fingerprint="f"))) == 3
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
    assert isinstance(echo.heard, Brief)
    assert echo.heard.metadata == Metadata(duration_s=1)
