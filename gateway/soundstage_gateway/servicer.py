"""SongService: wire in, orchestration, wire out; and what a gateway offers."""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc.aio
import structlog

from soundstage.music.v1.audio_service_pb2_grpc import add_AudioServiceServicer_to_server
from soundstage.music.v1.catalog_service_pb2 import GetCapabilitiesRequest
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceStub, add_CatalogServiceServicer_to_server
from soundstage.music.v1.composer_service_pb2_grpc import add_ComposerServiceServicer_to_server
from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_LM,
    STAGE_VAE,
    Accepted,
    AlignLyricsRequest,
    AlignLyricsResponse,
    GenerateSongRequest,
    GenerateSongResponse,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceServicer, add_SongServiceServicer_to_server
from soundstage.stage.v1.dit_service_pb2 import AlignRequest
from soundstage_gateway.assets import Assets
from soundstage_gateway.audio_servicer import AudioServicer
from soundstage_gateway.catalog_servicer import CatalogServicer
from soundstage_gateway.composer_servicer import ComposerServicer
from soundstage_gateway.hearing import encode
from soundstage_gateway.lyrics import Finished, write_lrc
from soundstage_gateway.order import MAX_VARIANTS, Order, read_order
from soundstage_gateway.song import Heard, Song
from soundstage_gateway.stages import Stages, ask_once
from soundstage_runtime.admission import Admission
from soundstage_runtime.call import name_song
from soundstage_runtime.pcm import FRAMES_PER_CHUNK
from soundstage_runtime.serve import Service
from soundstage_runtime.validation import Checks
from soundstage_runtime.worker import Worker

_log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]
EVENTS_AHEAD = 8  # events held for a client that reads slower than the stages write


class SongServicer(SongServiceServicer):
    """Makes songs; `admission` bounds the variants in flight.

    A client that takes nothing for `stall_timeout_s` while there is something to take loses its call.
    """

    def __init__(self, stages: Stages, admission: Admission, assets: Assets, *, stall_timeout_s: float) -> None:
        self._stages = stages
        self._admission = admission
        self._assets = assets
        self._stall_timeout_s = stall_timeout_s
        self._finished = Finished()

    async def GenerateSong(
        self, request: GenerateSongRequest, context: Context
    ) -> AsyncGenerator[GenerateSongResponse, None]:
        """See song_service.proto."""
        order = read_order(
            request,
            self._assets,
            draw_seed=lambda: secrets.randbits(32),
            max_variants=max_variants(self._admission),
        )
        async with self._admission.enter(len(order.seeds)):
            started_s = time.monotonic()
            name = f"songs/{uuid.uuid4().hex}"
            name_song(name)
            async with aclosing(self._make(name, order)) as events:
                sequence = 0
                async for event in events:
                    event.sequence = sequence
                    sequence += 1
                    yield event
            # A place is likely to be free again after one song's share of the time all places take.
            self._admission.retry_after_s = max(0.5, (time.monotonic() - started_s) / self._admission.limit)

    async def _make(self, name: str, order: Order) -> AsyncGenerator[GenerateSongResponse, None]:
        needed = (STAGE_LM, STAGE_DIT, STAGE_VAE) if order.is_planned else (STAGE_DIT, STAGE_VAE)
        found = await asyncio.gather(*(self._stages.describe(stage) for stage in needed))
        _check_length(order, max_duration_s=min(stage.max_duration_s for stage in found))
        fingerprints = {
            stage: description.models[0].model_fingerprint for stage, description in zip(needed, found, strict=True)
        }
        yield GenerateSongResponse(
            accepted=Accepted(song=name, seeds=order.seeds, songs_in_flight=self._admission.in_flight)
        )
        source = await self._hear_source(order, fingerprints[STAGE_VAE])
        songs = [
            Song(name, order, seed, source=source, stages=self._stages, fingerprints=fingerprints)
            for seed in order.seeds
        ]
        async with aclosing(_interleave(songs, self._stall_timeout_s)) as events:
            async for event in events:
                if event.HasField("completed"):
                    self._finished.note(name, event.variant, songs[event.variant].handle)
                yield event

    async def AlignLyrics(self, request: AlignLyricsRequest, context: Context) -> AlignLyricsResponse:
        """See song_service.proto."""
        align = AlignRequest(handle=self._finished.find(request.song, request.variant))
        name_song(request.song)
        async with self._admission.enter():
            aligned = await ask_once(STAGE_DIT, self._stages.dit.Align, align)
        return AlignLyricsResponse(lines=aligned.lines, score=aligned.score, lrc=write_lrc(aligned.lines))

    async def _hear_source(self, order: Order, model_fingerprint: str) -> Heard:
        """Encode the source, once for all variants."""
        canvas = order.source
        if canvas is None or canvas.is_silent:
            return Heard()
        started_s = time.monotonic()
        pieces = canvas.pieces(FRAMES_PER_CHUNK)
        latents = await encode(self._stages, pieces, canvas.num_frames, model_fingerprint=model_fingerprint)
        return Heard(latents=tuple(latents), took_s=time.monotonic() - started_s)


def _check_length(order: Order, *, max_duration_s: float) -> None:
    """Refuse a song that is longer than the stages make."""
    checks = Checks()
    if order.source is None:
        checks.metadata(order.metadata, max_duration_s=max_duration_s)
    elif order.source.duration_s > max_duration_s:
        checks.refuse("source", f"makes a song of {order.source.duration_s:g} s; at most {max_duration_s:g} s are made")
    checks.finish()


def max_variants(admission: Admission) -> int:
    """The most variants of one call: more than there are places could never be made."""
    return min(MAX_VARIANTS, admission.limit)


async def _interleave(songs: list[Song], stall_timeout_s: float) -> AsyncGenerator[GenerateSongResponse, None]:
    """Run the variants side by side; the first error ends them all."""
    reader = asyncio.current_task()
    assert reader is not None
    queue: asyncio.Queue[GenerateSongResponse | Exception | None] = asyncio.Queue(EVENTS_AHEAD)

    async def run(variant: int, song: Song) -> None:
        try:
            async with aclosing(song.events()) as events:
                async for event in events:
                    event.variant = variant
                    await queue.put(event)
            await queue.put(None)
        except Exception as error:  # handed to the reader, which raises it
            await queue.put(error)

    def give_up() -> None:
        # The reader hangs in a write that the client does not take: no error would reach either of them.
        _log.warning("client_stalled", stall_timeout_s=stall_timeout_s)
        reader.cancel()

    tasks = [asyncio.create_task(run(variant, song)) for variant, song in enumerate(songs)]
    try:
        running = len(tasks)
        while running:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                running -= 1
            else:
                stall = asyncio.get_running_loop().call_later(stall_timeout_s, give_up)
                try:
                    yield event
                finally:
                    stall.cancel()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def offer(
    stages: Stages, admission: Admission, assets: Assets, uploads: Admission, *, stall_timeout_s: float
) -> list[Service]:
    """The services of a gateway, for a Server; `admission` bounds songs, `uploads` files being taken in."""
    song = SongServicer(stages, admission, assets, stall_timeout_s=stall_timeout_s)
    audio = AudioServicer(assets, uploads, Worker("decoder"))
    composer = ComposerServicer(stages, admission)
    catalog = CatalogServicer(stages, admission, max_variants=max_variants(admission))
    return [
        Service(
            name="soundstage.music.v1.SongService", add=lambda server: add_SongServiceServicer_to_server(song, server)
        ),
        Service(
            name="soundstage.music.v1.AudioService",
            add=lambda server: add_AudioServiceServicer_to_server(audio, server),
        ),
        Service(
            name="soundstage.music.v1.ComposerService",
            add=lambda server: add_ComposerServiceServicer_to_server(composer, server),
        ),
        Service(
            name="soundstage.music.v1.CatalogService",
            add=lambda server: add_CatalogServiceServicer_to_server(catalog, server),
        ),
    ]


async def warm_up(channel: grpc.aio.Channel) -> None:
    """Ask for the capabilities: the gateway is ready whether or not its stages are, and says which are."""
    await CatalogServiceStub(channel).GetCapabilities(GetCapabilitiesRequest())
