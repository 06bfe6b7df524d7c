"""A variant in the making: plan, denoise, each stage's answers turned into public events as they come."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_LM,
    STAGE_VAE,
    GenerateSongResponse,
    Plan,
    PlannerOptions,
    Progress,
    Queued,
    Stage,
    StageTiming,
)
from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest, DenoiseResponse, DenoiseSetup
from soundstage.stage.v1.lm_service_pb2 import ComposePlan, ComposeRequest, ComposeResponse
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_gateway.audio_file import Samples
from soundstage_gateway.codec import encode
from soundstage_gateway.hearing import REFERENCE_FRAMES, shift
from soundstage_gateway.order import Order
from soundstage_gateway.stages import Stages, ask
from soundstage_runtime.score import (
    CODE_RATE_HZ,
    LATENTS_PER_CODE,
    REFERENCE_LATENTS,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_LATENT,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """The latents of an order's source, none where there is no source or it is silent, and how long they took."""

    latents: tuple[LatentChunk, ...] = ()
    took_s: float = 0.0


class Variant:
    """One variant. `events` may be iterated once; closing it cancels the stage at work.

    When it has ended, `latents` are the master tape, and `handle` is what the diffusion stage calls the song.
    """

    def __init__(
        self,
        order: Order,
        seed: int,
        *,
        source: Heard,
        references: Sequence[Samples],
        stages: Stages,
        fingerprints: Mapping[Stage.ValueType, str],
    ) -> None:
        """Make it from an order, the latents of its source, and what is heard of each reference [n, 2]."""
        self.seed = seed
        self.handle = ""
        self.latents: list[LatentChunk] = []
        self.timings: list[StageTiming] = []
        self.metadata = order.metadata
        self._order = order
        self._source = source
        self._references = references
        self._stages = stages
        self._fingerprints = fingerprints
        self._caption = order.caption
        self._codes = list(order.codes)

    async def events(self) -> AsyncGenerator[GenerateSongResponse, None]:
        """Yield plan, queued and progress; raises ServiceError."""
        for stage in (self._plan, self._denoise):
            async with aclosing(stage()) as events:
                async for event in events:
                    yield event

    async def _plan(self) -> AsyncGenerator[GenerateSongResponse, None]:
        order = self._order
        if not order.is_planned:
            if order.codes:
                self.metadata = SongMetadata()
                self.metadata.CopyFrom(order.metadata)
                self.metadata.duration_s = len(order.codes) / CODE_RATE_HZ
            yield GenerateSongResponse(plan=Plan(metadata=self.metadata, code_count=len(order.codes)))
            return
        request = compose_request(order, order.planner, seed=self.seed, model_fingerprint=self._fingerprints[STAGE_LM])
        started_s = time.monotonic()
        code_count = 0
        async with aclosing(ask(STAGE_LM, self._stages.lm.Compose, request, ComposeResponse)) as responses:
            async for response in responses:
                if response.HasField("plan"):
                    plan = public_plan(response.plan)
                    self.metadata, code_count = plan.metadata, plan.code_count
                    self._caption = plan.caption or order.caption
                    yield GenerateSongResponse(plan=plan)
                elif response.HasField("codes"):
                    self._codes += response.codes.codes
                    yield _progress(STAGE_LM, len(self._codes), code_count)
        self._note_time(STAGE_LM, started_s)

    async def _hear_references(self) -> list[LatentChunk]:
        """Encode what is heard of each reference; the source is encoded already, once for all variants."""
        started_s = time.monotonic()
        latents: list[LatentChunk] = []
        for index, reference in enumerate(self._references):
            fingerprint = self._fingerprints[STAGE_VAE]
            heard = await encode(self._stages, [reference], REFERENCE_FRAMES, model_fingerprint=fingerprint)
            latents += shift(heard, index * REFERENCE_LATENTS)
        if self._source.latents or latents:
            self._note_time(STAGE_VAE, started_s - self._source.took_s)
        return latents

    async def _denoise(self) -> AsyncGenerator[GenerateSongResponse, None]:
        if self._codes:
            latent_frames = len(self._codes) * LATENTS_PER_CODE
        elif self._order.source:
            latent_frames = self._order.source.num_frames // SAMPLES_PER_LATENT
        else:
            latent_frames = round(self.metadata.duration_s * SAMPLE_RATE_HZ) // SAMPLES_PER_LATENT
        setup = DenoiseSetup(
            caption=self._caption,
            lyrics=self._order.lyrics,
            metadata=self.metadata,
            codes=self._codes,
            latent_frames=latent_frames,
            seed=self.seed,
            options=self._order.diffusion,
            model_fingerprint=self._fingerprints[STAGE_DIT],
            task=self._order.task,
            source_frames=latent_frames if self._source.latents else 0,
            reference_count=len(self._order.references),
            adapters=self._order.adapters,
        )
        requests = self._denoise_requests(setup, await self._hear_references())
        started_s = time.monotonic()
        async with aclosing(ask(STAGE_DIT, self._stages.dit.Denoise, requests, DenoiseResponse)) as responses:
            async for response in responses:
                if response.HasField("queued"):
                    queued = response.queued
                    yield GenerateSongResponse(
                        queued=Queued(stage=STAGE_DIT, position=queued.position, wait_s=queued.wait_s)
                    )
                elif response.HasField("progress"):
                    yield _progress(STAGE_DIT, response.progress.step, response.progress.steps)
                elif response.HasField("latents"):
                    self.latents.append(response.latents)
                elif response.HasField("done"):
                    self.handle = response.done.handle
        self._note_time(STAGE_DIT, started_s)

    async def _denoise_requests(
        self, setup: DenoiseSetup, references: list[LatentChunk]
    ) -> AsyncGenerator[DenoiseRequest, None]:
        yield DenoiseRequest(setup=setup)
        for chunk in self._source.latents:
            yield DenoiseRequest(source=chunk)
        for chunk in references:
            yield DenoiseRequest(reference=chunk)

    def _note_time(self, stage: Stage.ValueType, started_s: float) -> None:
        self.timings.append(
            StageTiming(
                stage=stage, duration_s=time.monotonic() - started_s, model_fingerprint=self._fingerprints[stage]
            )
        )


class Words(Protocol):
    """What a planner is told in words."""

    @property
    def caption(self) -> str: ...
    @property
    def lyrics(self) -> str: ...
    @property
    def metadata(self) -> SongMetadata: ...


def compose_request(words: Words, planner: PlannerOptions, *, seed: int, model_fingerprint: str) -> ComposeRequest:
    """Ask the language model for a plan; switches that the client left alone are left to the model's defaults."""
    request = ComposeRequest(
        caption=words.caption,
        lyrics=words.lyrics,
        metadata=words.metadata,
        seed=seed,
        sampling=planner.sampling,
        model_fingerprint=model_fingerprint,
    )
    for switch in ("write_metadata", "rewrite_caption", "detect_language"):
        if planner.HasField(switch):
            setattr(request, switch, getattr(planner, switch))
    return request


def public_plan(plan: ComposePlan) -> Plan:
    """Write the language model's plan as clients see it."""
    return Plan(metadata=plan.metadata, code_count=plan.code_count, caption=plan.caption, fields=plan.fields)


def _progress(stage: Stage.ValueType, done: int, total: int) -> GenerateSongResponse:
    return GenerateSongResponse(progress=Progress(stage=stage, done=done, total=total))
