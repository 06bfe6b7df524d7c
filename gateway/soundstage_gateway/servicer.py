"""SongService: wire in, studio, wire out; and what a gateway offers."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc.aio
import structlog

from soundstage.music.v1.audio_service_pb2_grpc import add_AudioServiceServicer_to_server
from soundstage.music.v1.catalog_service_pb2 import GetCapabilitiesRequest
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceStub, add_CatalogServiceServicer_to_server
from soundstage.music.v1.composer_service_pb2_grpc import add_ComposerServiceServicer_to_server
from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_VAE,
    AlignLyricsRequest,
    AlignLyricsResponse,
    CancelSongRequest,
    CancelSongResponse,
    CreateSongRequest,
    CreateSongResponse,
    DeleteSongRequest,
    DeleteSongResponse,
    GenerateSongRequest,
    GenerateSongResponse,
    GetSongRequest,
    GetSongResponse,
    ListSongsRequest,
    ListSongsResponse,
    StageTiming,
    StreamAudioRequest,
    StreamAudioResponse,
    WatchSongRequest,
    WatchSongResponse,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceServicer, add_SongServiceServicer_to_server
from soundstage.stage.v1.dit_service_pb2 import AlignRequest
from soundstage_gateway.assets import Assets
from soundstage_gateway.audio_format import read_output
from soundstage_gateway.audio_servicer import AudioServicer
from soundstage_gateway.catalog_servicer import DEFAULT_PAGE_SIZE, CatalogServicer, check_page
from soundstage_gateway.composer_servicer import ComposerServicer
from soundstage_gateway.lyrics import write_lrc
from soundstage_gateway.metrics import Metrics
from soundstage_gateway.order import count_variants
from soundstage_gateway.playback import play
from soundstage_gateway.song_errors import VariantUnfinishedError
from soundstage_gateway.stages import Stages, ask_once
from soundstage_gateway.store import KeptSong, RequestKnownError
from soundstage_gateway.studio import Making, Studio
from soundstage_runtime.admission import Admission
from soundstage_runtime.call import name_song
from soundstage_runtime.serve import Service
from soundstage_runtime.validation import Checks

_log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
EVENTS_AHEAD = 8  # events held for a client that reads slower than the stages write
_REQUEST_ID: Final = re.compile(r"[ -~]{1,64}")


class SongServicer(SongServiceServicer):
    """Makes songs and plays them; `listeners` bounds the streams of audio, `watchers` those of events.

    A client that takes nothing for `stall_timeout_s` while there is something to take loses its call.
    """

    def __init__(
        self,
        studio: Studio,
        stages: Stages,
        songs: Admission,
        listeners: Admission,
        watchers: Admission,
        metrics: Metrics,
        *,
        stall_timeout_s: float,
    ) -> None:
        self._studio = studio
        self._stages = stages
        self._songs = songs
        self._listeners = listeners
        self._watchers = watchers
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s

    async def GenerateSong(
        self, request: GenerateSongRequest, context: Context
    ) -> AsyncGenerator[GenerateSongResponse, None]:
        """See song_service.proto."""
        async with self._listeners.enter(min(count_variants(request), self._studio.max_variants)):
            making = await self._studio.begin(request, is_detached=request.detach)
            try:
                async with aclosing(self._perform(making)) as events:
                    async for event in self._patient(events):
                        yield event
            finally:
                if not request.detach:
                    await self._studio.stop(making)

    async def CreateSong(self, request: CreateSongRequest, context: Context) -> CreateSongResponse:
        """See song_service.proto."""
        check_request_id("request_id", request.request_id)
        request_id = request.request_id or None
        found = await self._studio.find_request(request_id) if request_id else None
        if found is None:
            try:
                found = (await self._studio.begin(request.request, request_id=request_id, is_detached=True)).kept
            except RequestKnownError:  # a call beside this one was first
                found = await self._studio.find_request(request.request_id)
                assert found is not None, "what is known is found"
        return CreateSongResponse(song=found.song)

    async def GetSong(self, request: GetSongRequest, context: Context) -> GetSongResponse:
        """See song_service.proto."""
        return GetSongResponse(song=(await self._studio.find(request.song)).song)

    async def ListSongs(self, request: ListSongsRequest, context: Context) -> ListSongsResponse:
        """See song_service.proto."""
        check_page(request)
        before = int(request.page_token) if request.page_token else None
        page, last = await self._studio.page(request.page_size or DEFAULT_PAGE_SIZE, before=before)
        return ListSongsResponse(songs=[kept.song for kept in page], next_page_token=str(last or ""))

    async def CancelSong(self, request: CancelSongRequest, context: Context) -> CancelSongResponse:
        """See song_service.proto."""
        return CancelSongResponse(song=(await self._studio.cancel(request.song)).song)

    async def DeleteSong(self, request: DeleteSongRequest, context: Context) -> DeleteSongResponse:
        """See song_service.proto."""
        await self._studio.delete(request.song)
        return DeleteSongResponse()

    async def WatchSong(self, request: WatchSongRequest, context: Context) -> AsyncGenerator[WatchSongResponse, None]:
        """See song_service.proto."""
        after = request.after_sequence if request.HasField("after_sequence") else None
        async with self._watchers.enter(), aclosing(self._studio.watch(request.song, after=after)) as events:
            async for event in self._patient(events):
                yield WatchSongResponse(event=event)

    async def StreamAudio(
        self, request: StreamAudioRequest, context: Context
    ) -> AsyncGenerator[StreamAudioResponse, None]:
        """See song_service.proto."""
        checks = Checks()
        output = read_output(checks, request.output, can_normalise=True)
        checks.finish()
        name_song(request.song)
        kept = await self._studio.find(request.song)
        has_to_wait = any(not variant.frame_count for variant in kept.song.variants[request.variant :][:1])
        async with self._listeners.enter(), self._studio.tape(request.song, request.variant) as tape:
            peak = None
            if output.peak_dbfs is not None:
                peak = await self._studio.find_peak(request.song, request.variant, tape)
            frame_count = request.frame_count if request.HasField("frame_count") else None
            playing = play(tape, output, first_frame=request.first_frame, frame_count=frame_count, peak=peak)
            async with aclosing(self._timed(playing, kept) if has_to_wait else playing) as events:
                async for event in self._patient(events):
                    yield event

    async def AlignLyrics(self, request: AlignLyricsRequest, context: Context) -> AlignLyricsResponse:
        """See song_service.proto."""
        kept = await self._studio.find_variant(request.song, request.variant)
        if not kept.song.variants[request.variant].frame_count:
            raise VariantUnfinishedError(f"variant {request.variant} of {request.song} is not made, or not yet")
        name_song(request.song)
        async with self._songs.enter():
            align = AlignRequest(handle=kept.handles[request.variant])
            aligned = await ask_once(STAGE_DIT, self._stages.dit.Align, align)
        return AlignLyricsResponse(
            lines=aligned.lines, score=aligned.score, plan_score=aligned.plan_score, lrc=write_lrc(aligned.lines)
        )

    async def _perform(self, making: Making) -> AsyncGenerator[GenerateSongResponse, None]:
        """Yield a song's events, and its audio as soon as there is some; the first error ends it.

        An event that waits until its variant has been played holds back the numbers of those that overtake it.
        """
        held: set[int] = set()
        last = 0
        queue: asyncio.Queue[GenerateSongResponse | Exception | None] = asyncio.Queue(EVENTS_AHEAD)
        tasks: list[asyncio.Task[None]] = []

        async def put_all(events: AsyncGenerator[GenerateSongResponse, None]) -> None:
            try:
                async with aclosing(events):
                    async for event in events:
                        if event.HasField("completed") and not event.completed.pcm_sha256:
                            held.add(event.sequence)
                            tasks.append(asyncio.create_task(put_all(self._play(making, event))))
                        else:
                            await queue.put(_copy(event))
                await queue.put(None)
            except Exception as error:  # handed to the reader, which raises it
                await queue.put(error)

        tasks.append(asyncio.create_task(put_all(making.log.follow())))
        try:
            num_ended = 0
            while num_ended < len(tasks):
                event = await queue.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    num_ended += 1
                else:
                    held.discard(event.sequence if event.HasField("completed") else -1)
                    last = max(last, event.sequence)
                    event.sequence = min(last, *(number - 1 for number in held)) if held else last
                    yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _play(self, making: Making, end: GenerateSongResponse) -> AsyncGenerator[GenerateSongResponse, None]:
        """Yield the audio of a variant that is made, and its end with what only the audio tells."""
        number, started_s = end.variant, time.monotonic()
        async with (
            self._studio.tape(making.kept.name, number) as tape,
            aclosing(self._timed(play(tape, making.order.output), making.kept)) as events,
        ):
            async for event in events:
                if event.HasField("audio_header"):
                    yield GenerateSongResponse(variant=number, audio_header=event.audio_header)
                elif event.HasField("audio_chunk"):
                    yield GenerateSongResponse(variant=number, audio_chunk=event.audio_chunk)
                else:
                    end, trailer = _copy(end), event.audio_trailer
                    end.completed.frame_count = trailer.frame_count
                    end.completed.pcm_sha256 = trailer.pcm_sha256
                    end.completed.peak = trailer.peak
                    took_s, fingerprint = time.monotonic() - started_s, making.fingerprints[STAGE_VAE]
                    timing = StageTiming(stage=STAGE_VAE, duration_s=took_s, model_fingerprint=fingerprint)
                    end.completed.timings.append(timing)
                    self._metrics.count_stage(timing)
                    yield end

    async def _timed(
        self, events: AsyncGenerator[StreamAudioResponse, None], kept: KeptSong
    ) -> AsyncGenerator[StreamAudioResponse, None]:
        """Yield events, and count how long the first audio took from the song's acceptance."""
        is_heard = False
        async with aclosing(events):
            async for event in events:
                if event.HasField("audio_chunk") and not is_heard:
                    is_heard = True
                    self._metrics.count_first_audio(time.time() - kept.song.create_time.ToNanoseconds() / 1e9)
                yield event

    async def _patient(self, events: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """Yield events, and end a call whose client does not take them."""
        reader = asyncio.current_task()
        assert reader is not None

        def give_up() -> None:
            # The reader hangs in a write that the client does not take: no error would reach either of them.
            _log.warning("client_stalled", stall_timeout_s=self._stall_timeout_s)
            reader.cancel()

        async for event in events:
            stall = asyncio.get_running_loop().call_later(self._stall_timeout_s, give_up)
            try:
                yield event
            finally:
                stall.cancel()


def check_request_id(field: str, request_id: str) -> None:
    """Refuse an id that `field` gives and that cannot be one; an empty one is none."""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        checks = Checks()
        checks.refuse(field, f"is {request_id[:80]!r}; must be 1 to 64 printable ASCII characters")
        checks.finish()


def _copy(event: GenerateSongResponse) -> GenerateSongResponse:
    copy = GenerateSongResponse()
    copy.CopyFrom(event)
    return copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a gateway offers, through whichever door."""

    song: SongServicer
    audio: AudioServicer
    composer: ComposerServicer
    catalog: CatalogServicer

    def services(self) -> list[Service]:
        """Return the services for a Server."""
        return [
            Service(
                name="soundstage.music.v1.SongService",
                add=lambda server: add_SongServiceServicer_to_server(self.song, server),
            ),
            Service(
                name="soundstage.music.v1.AudioService",
                add=lambda server: add_AudioServiceServicer_to_server(self.audio, server),
            ),
            Service(
                name="soundstage.music.v1.ComposerService",
                add=lambda server: add_ComposerServiceServicer_to_server(self.composer, server),
            ),
            Service(
                name="soundstage.music.v1.CatalogService",
                add=lambda server: add_CatalogServiceServicer_to_server(self.catalog, server),
            ),
        ]


def offer(
    studio: Studio,
    stages: Stages,
    assets: Assets,
    metrics: Metrics,
    *,
    songs: Admission,
    listeners: Admission,
    watchers: Admission,
    uploads: Admission,
    stall_timeout_s: float,
) -> Offer:
    """Make what a gateway offers; admissions bound songs in the making, streams of audio and of events, and uploads."""
    return Offer(
        song=SongServicer(studio, stages, songs, listeners, watchers, metrics, stall_timeout_s=stall_timeout_s),
        audio=AudioServicer(assets, uploads),
        composer=ComposerServicer(stages, songs),
        catalog=CatalogServicer(stages, songs, max_variants=studio.max_variants),
    )


async def warm_up(channel: grpc.aio.Channel, *, key: str = "") -> None:
    """Ask for the capabilities: the gateway is ready whether or not its stages are, and says which are."""
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    await CatalogServiceStub(channel).GetCapabilities(GetCapabilitiesRequest(), metadata=metadata)
