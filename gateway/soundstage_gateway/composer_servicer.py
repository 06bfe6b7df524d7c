"""ComposerService: the language model alone, and what it needs to hear audio."""

import secrets
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio

from soundstage.music.v1.composer_service_pb2 import (
    CodeRun,
    DescribeAudioRequest,
    DescribeAudioResponse,
    DescribeAudioSetup,
    DraftSongRequest,
    DraftSongResponse,
    PlanSongRequest,
    PlanSongResponse,
    PlanStarted,
    PolishSongRequest,
    PolishSongResponse,
    ScoreSongRequest,
    ScoreSongResponse,
)
from soundstage.music.v1.composer_service_pb2_grpc import ComposerServiceServicer
from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, STAGE_VAE, Stage
from soundstage.stage.v1.dit_service_pb2 import TokenizeRequest, TokenizeSetup
from soundstage.stage.v1.lm_service_pb2 import (
    ComposeResponse,
    DraftRequest,
    PolishRequest,
    ScoreRequest,
    UnderstandRequest,
)
from soundstage.stage.v1.vae_service_pb2 import EncodeRequest, EncodeResponse, EncodeSetup
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_gateway.order import check_codes, check_words
from soundstage_gateway.stages import Stages, ask, ask_once
from soundstage_gateway.variant import compose_request, public_plan
from soundstage_runtime.admission import Admission
from soundstage_runtime.request_stream import patient
from soundstage_runtime.score import INSTRUMENTAL, LATENTS_PER_CODE, MAX_LATENT_FRAMES, SAMPLES_PER_LATENT, SPREAD_RANGE
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks

Context = grpc.aio.ServicerContext[Any, Any]
_SHORTEST_FRAMES = SAMPLES_PER_LATENT * LATENTS_PER_CODE
_LONGEST_FRAMES = SAMPLES_PER_LATENT * MAX_LATENT_FRAMES

R = TypeVar("R", PlanSongRequest, DraftSongRequest, PolishSongRequest, DescribeAudioSetup)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Words:
    caption: str
    lyrics: str
    metadata: SongMetadata


class ComposerServicer(ComposerServiceServicer):
    """Asks the language model; every call takes one of the places that songs take.

    A client that sends nothing for `idle_timeout_s` loses its call and its place.
    """

    def __init__(self, stages: Stages, admission: Admission, *, idle_timeout_s: float = 30.0) -> None:
        self._stages = stages
        self._admission = admission
        self._idle_timeout_s = idle_timeout_s

    async def PlanSong(self, request: PlanSongRequest, context: Context) -> AsyncGenerator[PlanSongResponse, None]:
        """See composer_service.proto."""
        checks = Checks()
        check_words(checks, request)
        metadata = checks.metadata(request.metadata)
        checks.sampling(request.planner.sampling, field="planner.sampling")
        if request.planner.HasField("enabled") and not request.planner.enabled:
            checks.refuse("planner.enabled", "is false; a plan is made by the planner")
        checks.finish()
        seed = _seed_of(request)
        async with self._admission.enter():
            lyrics = INSTRUMENTAL if request.instrumental else request.lyrics
            compose = compose_request(
                _Words(caption=request.caption, lyrics=lyrics, metadata=metadata),
                request.planner,
                seed=seed,
                model_fingerprint=(await self._fingerprints(STAGE_LM))[STAGE_LM],
            )
            if request.HasField("write_codes"):
                compose.write_codes = request.write_codes
            yield PlanSongResponse(started=PlanStarted(seed=seed))
            async with aclosing(ask(STAGE_LM, self._stages.lm.Compose, compose, ComposeResponse)) as responses:
                async for response in responses:
                    yield _public_piece(response)

    async def DraftSong(self, request: DraftSongRequest, context: Context) -> DraftSongResponse:
        """See composer_service.proto."""
        checks = Checks()
        checks.text("query", request.query, max_chars=MAX_CAPTION_CHARS)
        if request.HasField("vocal_language"):
            checks.language("vocal_language", request.vocal_language)
        checks.sampling(request.sampling, field="sampling")
        checks.finish()
        seed = _seed_of(request)
        async with self._admission.enter():
            draft = DraftRequest(
                query=request.query, instrumental=request.instrumental, sampling=request.sampling, seed=seed
            )
            if request.HasField("vocal_language"):
                draft.vocal_language = request.vocal_language
            answer = await ask_once(STAGE_LM, self._stages.lm.Draft, draft)
        return DraftSongResponse(text=answer.text, seed=seed)

    async def PolishSong(self, request: PolishSongRequest, context: Context) -> PolishSongResponse:
        """See composer_service.proto."""
        checks = Checks()
        check_words(checks, request)
        metadata = checks.metadata(request.metadata)
        checks.sampling(request.sampling, field="sampling")
        checks.finish()
        seed = _seed_of(request)
        async with self._admission.enter():
            polish = PolishRequest(
                caption=request.caption,
                lyrics=request.lyrics,
                metadata=metadata,
                sampling=request.sampling,
                seed=seed,
            )
            answer = await ask_once(STAGE_LM, self._stages.lm.Polish, polish)
        return PolishSongResponse(text=answer.text, seed=seed)

    async def DescribeAudio(
        self, request_iterator: AsyncIterable[DescribeAudioRequest], context: Context
    ) -> DescribeAudioResponse:
        """See composer_service.proto."""
        requests = aiter(request_iterator)
        async with self._admission.enter():
            # Of what follows the setup the codec minds the pace.
            setup = await _read_setup(patient(requests, timeout_s=self._idle_timeout_s))
            seed = _seed_of(setup)
            codes = list(setup.codes) or await self._listen(setup, requests)
            understand = UnderstandRequest(codes=codes, sampling=setup.sampling, seed=seed)
            answer = await ask_once(STAGE_LM, self._stages.lm.Understand, understand)
        return DescribeAudioResponse(text=answer.text, seed=seed, codes=codes)

    async def ScoreSong(self, request: ScoreSongRequest, context: Context) -> ScoreSongResponse:
        """See composer_service.proto."""
        checks = Checks()
        if not request.codes:
            checks.refuse("codes", "is empty; give the audio codes of a plan or a description")
        check_codes(checks, "codes", request.codes)
        checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
        checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
        metadata = checks.metadata(request.metadata)
        if not (request.caption.strip() or request.lyrics.strip() or metadata.ListFields()):
            checks.refuse("caption", "is empty, and so are lyrics and metadata; say in one of them what to score")
        if request.HasField("spread"):
            checks.number("spread", request.spread, *SPREAD_RANGE)
        checks.finish()
        score = ScoreRequest(codes=request.codes, caption=request.caption, lyrics=request.lyrics, metadata=metadata)
        if request.HasField("spread"):
            score.spread = request.spread
        async with self._admission.enter():
            answer = await ask_once(STAGE_LM, self._stages.lm.Score, score)
        return ScoreSongResponse(likelihood=answer.likelihood)

    async def _listen(self, setup: DescribeAudioSetup, requests: AsyncIterator[DescribeAudioRequest]) -> list[int]:
        """Turn audio into codes: encode it, then tokenize the latents."""
        fingerprints = await self._fingerprints(STAGE_VAE, STAGE_DIT)

        async def audio() -> AsyncGenerator[EncodeRequest, None]:
            yield EncodeRequest(
                setup=EncodeSetup(
                    frame_count=setup.frame_count,
                    sample_format=setup.sample_format,
                    model_fingerprint=fingerprints[STAGE_VAE],
                )
            )
            async for request in requests:
                yield EncodeRequest(audio=request.audio)

        # All latents first, 4 MB for ten minutes: an error in the middle of a stream of requests would lose its words.
        async with aclosing(ask(STAGE_VAE, self._stages.vae.Encode, audio(), EncodeResponse)) as responses:
            latents = [response.latents async for response in responses]

        async def tokens() -> AsyncGenerator[TokenizeRequest, None]:
            yield TokenizeRequest(
                setup=TokenizeSetup(
                    latent_frames=setup.frame_count // SAMPLES_PER_LATENT, model_fingerprint=fingerprints[STAGE_DIT]
                )
            )
            for chunk in latents:
                yield TokenizeRequest(latents=chunk)

        return list((await ask_once(STAGE_DIT, self._stages.dit.Tokenize, tokens())).codes)

    async def _fingerprints(self, *stages: Stage.ValueType) -> Mapping[Stage.ValueType, str]:
        return {stage: (await self._stages.describe(stage)).models[0].model_fingerprint for stage in stages}


async def _read_setup(requests: AsyncIterator[DescribeAudioRequest]) -> DescribeAudioSetup:
    checks = Checks()
    first = await anext(requests, None)
    if first is None or not first.HasField("setup"):
        checks.refuse("setup", "is missing; the first message must carry it")
        checks.finish()
        raise AssertionError("finish raises")
    setup = first.setup
    check_codes(checks, "setup.codes", setup.codes)
    checks.sampling(setup.sampling, field="setup.sampling")
    if setup.codes and setup.frame_count:
        checks.refuse("setup.frame_count", f"is {setup.frame_count}; must be 0 when codes are given")
    elif not setup.codes:
        checks.number("setup.frame_count", setup.frame_count, _SHORTEST_FRAMES, _LONGEST_FRAMES)
    checks.finish()
    return setup


def _public_piece(response: ComposeResponse) -> PlanSongResponse:
    pieces: dict[str | None, Callable[[], PlanSongResponse]] = {
        "field": lambda: PlanSongResponse(field=response.field),
        "plan": lambda: PlanSongResponse(plan=public_plan(response.plan)),
        "codes": lambda: PlanSongResponse(
            codes=CodeRun(first_code=response.codes.first_code, codes=response.codes.codes)
        ),
    }
    return pieces[response.WhichOneof("event")]()


def _seed_of(request: R) -> int:
    return request.seed if request.HasField("seed") else secrets.randbits(32)
