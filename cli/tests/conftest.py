"""A gateway that keeps songs and plays them, and loses connections when it is told to."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status
from numpy.typing import NDArray

from soundstage.music.v1.song_service_pb2 import (
    SONG_STATE_CANCELLED,
    SONG_STATE_COMPLETED,
    SONG_STATE_RUNNING,
    STAGE_LM,
    Accepted,
    AlignLyricsRequest,
    AlignLyricsResponse,
    CancelSongRequest,
    CancelSongResponse,
    Completed,
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
    Plan,
    Progress,
    Song,
    SongVariant,
    StreamAudioRequest,
    StreamAudioResponse,
    WatchSongRequest,
    WatchSongResponse,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceServicer, add_SongServiceServicer_to_server
from soundstage.type.v1.audio_pb2 import (
    ENCODING_PCM,
    SAMPLE_FORMAT_S16,
    AudioChunk,
    AudioFormat,
    AudioHeader,
    AudioTrailer,
)
from soundstage_gateway.audio_encoder import open_encoder
from soundstage_runtime.errors import ServiceError, to_status

Context = grpc.ServicerContext
PAGE_SIZE = 2
CHUNK_FRAMES = 1000
NUM_FRAMES = 10 * CHUNK_FRAMES + 7


def samples(variant: int = 0) -> NDArray[np.float32]:
    """What each variant sounds like, [NUM_FRAMES, 2], in whole steps of 16 bits."""
    steps = np.random.default_rng(variant).integers(-32_768, 32_767, (NUM_FRAMES, 2))
    return (steps / 32_767).astype(np.float32)


@dataclass
class Keeping(SongServiceServicer):
    """Each of the first streams is cut after as many pieces as `cuts` and `watch_cuts` say, in their order.

    The first `lost_answers` songs begin unheard. What is cut or lost gives `reason`, if there is one. While `is_stuck`
    songs begin and never end. While it `is_away` none is cancelled.
    """

    songs: dict[str, Song] = field(default_factory=dict[str, Song])
    created: list[GenerateSongRequest] = field(default_factory=list[GenerateSongRequest])
    streamed: list[StreamAudioRequest] = field(default_factory=list[StreamAudioRequest])
    cuts: list[int] = field(default_factory=list[int])
    watch_cuts: list[int] = field(default_factory=list[int])
    lost_answers: int = 0
    reason: str = ""
    requests: dict[str, Song] = field(default_factory=dict[str, Song])  # by their ids
    is_stuck: bool = False
    is_away: bool = False
    watched: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def keep(self, identifier: str, **fields: Any) -> Song:
        song = Song(name=f"songs/{identifier:0<32}", **fields)
        song.create_time.GetCurrentTime()
        song.expire_time.FromSeconds(song.create_time.seconds + 3 * 3600 + 30)
        self.songs[song.name] = song
        return song

    def find(self, name: str, context: Context) -> Song:
        if name not in self.songs:
            context.abort(grpc.StatusCode.NOT_FOUND, f"song is {name!r}, which is not kept here")
        return self.songs[name]

    def lose(self, context: Context) -> NoReturn:
        error = ServiceError("Connection reset by peer")
        error.code, error.reason = grpc.StatusCode.UNAVAILABLE, self.reason
        if self.reason:
            context.abort_with_status(rpc_status.to_status(to_status(error)))
        context.abort(error.code, error.message)

    def CreateSong(self, request: CreateSongRequest, context: Context) -> CreateSongResponse:
        if request.request_id not in self.requests:
            self.requests[request.request_id] = self.begin(request)
        if self.lost_answers:
            self.lost_answers -= 1
            self.lose(context)
        return CreateSongResponse(song=self.requests[request.request_id])

    def begin(self, request: CreateSongRequest) -> Song:
        self.created.append(request.request)
        variants = [SongVariant(seed=seed) for seed in range(request.request.variants or 1)]
        song = self.keep(f"{len(self.created):x}", request=request.request, variants=variants)
        song.state = SONG_STATE_RUNNING
        return song

    def GetSong(self, request: GetSongRequest, context: Context) -> GetSongResponse:
        return GetSongResponse(song=self.find(request.song, context))

    def ListSongs(self, request: ListSongsRequest, context: Context) -> ListSongsResponse:
        first = int(request.page_token or 0)
        stop = first + min(request.page_size, PAGE_SIZE)
        newest = list(self.songs.values())[::-1]
        return ListSongsResponse(songs=newest[first:stop], next_page_token=str(stop) if stop < len(newest) else "")

    def CancelSong(self, request: CancelSongRequest, context: Context) -> CancelSongResponse:
        if self.is_away:
            self.lose(context)
        song = self.find(request.song, context)
        if song.state == SONG_STATE_RUNNING:
            song.state = SONG_STATE_CANCELLED
            self.cancelled.set()
        return CancelSongResponse(song=song)

    def DeleteSong(self, request: DeleteSongRequest, context: Context) -> DeleteSongResponse:
        del self.songs[self.find(request.song, context).name]
        return DeleteSongResponse()

    def WatchSong(self, request: WatchSongRequest, context: Context) -> Iterator[WatchSongResponse]:
        song = self.find(request.song, context)
        cut = self.watch_cuts.pop(0) if self.watch_cuts else None
        for sequence, event in enumerate(self._events(song)):
            if sequence == cut:
                self.lose(context)
            event.sequence = sequence
            yield WatchSongResponse(event=event)
            self.watched.set()
            if self.is_stuck:
                self.cancelled.wait()
                context.abort(grpc.StatusCode.CANCELLED, "the song was cancelled")
        song.state = SONG_STATE_COMPLETED

    def _events(self, song: Song) -> Iterator[GenerateSongResponse]:
        yield GenerateSongResponse(accepted=Accepted(song=song.name, seeds=[variant.seed for variant in song.variants]))
        for number in range(len(song.variants)):
            yield GenerateSongResponse(variant=number, plan=Plan(metadata=song.request.metadata))
            yield GenerateSongResponse(variant=number, progress=Progress(stage=STAGE_LM, done=1, total=1))
            yield GenerateSongResponse(variant=number, completed=Completed(song=song.name))

    def StreamAudio(self, request: StreamAudioRequest, context: Context) -> Iterator[StreamAudioResponse]:
        self.streamed.append(request)
        self.find(request.song, context)
        cut = self.cuts.pop(0) if self.cuts else None
        for number, response in enumerate(play(request)):
            if number == cut:
                self.lose(context)
            yield response

    def GenerateSong(self, request: GenerateSongRequest, context: Context) -> Iterator[GenerateSongResponse]:
        self.created.append(request)
        for response in play(StreamAudioRequest()):
            yield GenerateSongResponse(audio_chunk=response.audio_chunk)

    def AlignLyrics(self, request: AlignLyricsRequest, context: Context) -> AlignLyricsResponse:
        self.find(request.song, context)
        return AlignLyricsResponse(lrc=f"[00:0{request.variant}.00]la\n", score=0.25)


def play(request: StreamAudioRequest) -> Iterator[StreamAudioResponse]:
    """What is asked for, in S16 at 48 kHz in stereo, really encoded."""
    written = AudioFormat(encoding=request.output.format.encoding or ENCODING_PCM, sample_format=SAMPLE_FORMAT_S16)
    written.sample_rate_hz, written.channels = 48_000, 2
    place = request.first_frame
    stop = place + request.frame_count if request.HasField("frame_count") else NUM_FRAMES
    yield StreamAudioResponse(audio_header=AudioHeader(format=written, first_frame=place, frame_count=stop - place))
    encoder = open_encoder(written, frame_count=stop - place)
    for first in range(place, stop, CHUNK_FRAMES):
        for piece in encoder.encode(samples(request.variant)[first : min(first + CHUNK_FRAMES, stop)]):
            chunk = AudioChunk(first_frame=place, frame_count=piece.frame_count, data=piece.data)
            yield StreamAudioResponse(audio_chunk=chunk)
            place += piece.frame_count
    for piece in encoder.finish():
        chunk = AudioChunk(first_frame=place, frame_count=piece.frame_count, data=piece.data)
        yield StreamAudioResponse(audio_chunk=chunk)
        place += piece.frame_count
    yield StreamAudioResponse(audio_trailer=AudioTrailer(frame_count=place - request.first_frame))


@pytest.fixture
def keeping() -> Keeping:
    """What the gateway keeps and is asked."""
    return Keeping()


@pytest.fixture
def gateway(keeping: Keeping) -> Iterator[str]:
    """The address of a gateway."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_SongServiceServicer_to_server(keeping, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()
