"""Songs from the client's side: made, watched and heard, though the connection is lost in between."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Final
from uuid import uuid4

import grpc
import grpc.aio

from soundstage.music.v1.song_service_pb2 import (
    SONG_STATE_COMPLETED,
    CancelSongRequest,
    CreateSongRequest,
    GenerateSongRequest,
    GenerateSongResponse,
    Song,
    StreamAudioRequest,
    StreamAudioResponse,
    WatchSongRequest,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.audio_pb2 import ENCODING_PCM, ENCODING_UNSPECIFIED, ENCODING_WAV
from soundstage_cli.sinks import Sink
from soundstage_runtime.errors import read_details

WAITS_S: Final = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_CANCEL_TIMEOUT_S: Final = 5.0
_FOR_GOOD: Final = "SONG_FAILED"  # though it was for want of a stage
_AWAY: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_CONTINUED: Final = (ENCODING_UNSPECIFIED, ENCODING_PCM, ENCODING_WAV)

Show = Callable[[GenerateSongResponse], None]


class Listener:
    """Makes, watches and hears songs over a channel. What it does about a lost connection it tells in words.

    Between attempts that get no further it waits for `waits_s`, one after another, and gives up after the last.
    """

    def __init__(
        self, channel: grpc.aio.Channel, *, tell: Callable[[str], None], waits_s: Sequence[float] = WAITS_S
    ) -> None:
        self._channel, self._songs = channel, SongServiceStub(channel)
        self._tell = tell
        self._waits_s = waits_s

    @asynccontextmanager
    async def making(self, request: GenerateSongRequest) -> AsyncGenerator[Song, None]:
        """Begin a song, which is made though nobody is connected; if the block fails or is cancelled, so is the song.

        SIGTERM and SIGHUP cancel the caller. Raises grpc.aio.AioRpcError.
        """
        caller = asyncio.current_task()
        assert caller is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, caller.cancel)
        song = await self._create(request)
        try:
            yield song
        except BaseException:
            await self._cancel(song.name)
            raise

    async def _cancel(self, song: str) -> None:
        """Cancel a song; where it outlives that, tell how it can be had."""
        try:
            answer = await self._songs.CancelSong(CancelSongRequest(song=song), timeout=_CANCEL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in _AWAY:
                self._tell(f"a gateway with a data folder keeps it: once it is back, `soundstage audio {song}` has it")
        else:
            if answer.song.state == SONG_STATE_COMPLETED:
                self._tell(f"the song was made already and is kept: `soundstage audio {song}` has it")

    async def _create(self, request: GenerateSongRequest) -> Song:
        """Begin a song once, though its answer is lost; a gateway that no request has reached is not asked again."""
        wanted = CreateSongRequest(request=request, request_id=uuid4().hex)
        retries, is_sent = _Retries(self._tell, self._waits_s), False
        while True:
            try:
                return (await self._songs.CreateSong(wanted)).song
            except grpc.aio.AioRpcError as error:
                is_sent |= self._channel.get_state() is not grpc.ChannelConnectivity.TRANSIENT_FAILURE
                if not is_sent:
                    raise
                await retries.wait(error)

    async def watch(self, song: str) -> AsyncGenerator[GenerateSongResponse, None]:
        """Yield a song's events, from the first again after a loss; raises grpc.aio.AioRpcError, the song's own too.

        A gateway that was started anew may have begun the song again, so old numbers say nothing.
        """
        retries = _Retries(self._tell, self._waits_s)
        while True:
            try:
                async for response in self._songs.WatchSong(WatchSongRequest(song=song)):
                    retries.renew(response.event.sequence)
                    yield response.event
                return
            except grpc.aio.AioRpcError as error:
                await retries.wait(error)

    async def hear(self, request: StreamAudioRequest) -> AsyncGenerator[StreamAudioResponse, None]:
        """Yield a song's audio. After a loss PCM and WAV go on with the next frame, under the header that they had.

        Other encodings start over, with a header. Raises grpc.aio.AioRpcError.
        """
        retries, is_continued = _Retries(self._tell, self._waits_s), request.output.format.encoding in _CONTINUED
        asked, next_frame, stop = request, 0, 0
        while True:
            try:
                async for response in self._songs.StreamAudio(asked):
                    if response.HasField("audio_header"):
                        if asked is not request:
                            continue
                        header = response.audio_header
                        next_frame, stop = header.first_frame, header.first_frame + header.frame_count
                    elif response.HasField("audio_chunk"):
                        next_frame = response.audio_chunk.first_frame + response.audio_chunk.frame_count
                        retries.renew(next_frame)
                    yield response
                return
            except grpc.aio.AioRpcError as error:
                await retries.wait(error)
            if is_continued and stop:
                if next_frame == stop:  # all but the trailer has come
                    return
                asked = _rest(request, next_frame, stop)

    async def perform(self, song: str, parts: Mapping[int, tuple[StreamAudioRequest, Sink]], *, show: Show) -> None:
        """Show a song's events, and write the part asked of each variant to its sink as soon as it can be heard.

        Raises grpc.aio.AioRpcError, and what the sinks raise.
        """
        playing: dict[int, asyncio.Task[None]] = {}
        try:
            async with asyncio.TaskGroup() as group, aclosing(self.watch(song)) as events:
                async for event in events:
                    show(event)
                    if event.HasField("completed") and event.variant in parts.keys() - playing.keys():
                        part = parts[event.variant]
                        playing[event.variant] = group.create_task(self.play(*part, show=show))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def play(self, request: StreamAudioRequest, sink: Sink, *, show: Show) -> None:
        """Write a variant's audio to its sink, and show it; raises grpc.aio.AioRpcError, and what the sink raises."""
        async with aclosing(self.hear(request)) as responses:
            async for response in responses:
                event = GenerateSongResponse(variant=request.variant)
                if response.HasField("audio_header"):
                    await sink.begin(response.audio_header)
                    event.audio_header.CopyFrom(response.audio_header)
                elif response.HasField("audio_chunk"):
                    await sink.write(response.audio_chunk)
                    event.audio_chunk.CopyFrom(response.audio_chunk)
                show(event)


def _rest(request: StreamAudioRequest, next_frame: int, stop: int) -> StreamAudioRequest:
    """Ask for what is left of a stream, without another header for what was a WAV file."""
    rest = StreamAudioRequest(first_frame=next_frame, frame_count=stop - next_frame)
    rest.song, rest.variant = request.song, request.variant
    rest.output.CopyFrom(request.output)
    rest.output.format.encoding = ENCODING_PCM
    return rest


class _Retries:
    """Waits between attempts, which grow until an attempt gets further than those before."""

    def __init__(self, tell: Callable[[str], None], waits_s: Sequence[float]) -> None:
        self._tell, self._waits_s = tell, waits_s
        self._waits: Iterator[float] = iter(waits_s)
        self._furthest = -1

    def renew(self, place: int) -> None:
        """Note how far this attempt got."""
        if place > self._furthest:
            self._furthest = place
            self._waits = iter(self._waits_s)

    async def wait(self, error: grpc.aio.AioRpcError) -> None:
        """Wait before the next attempt; raises an error that will not pass, or the last of too many."""
        wait_s, reason = next(self._waits, None), read_details(error).reason
        if error.code() is not grpc.StatusCode.UNAVAILABLE or reason == _FOR_GOOD or wait_s is None:
            raise error
        why = error.details() if reason else "the connection is lost"
        self._tell(f"{why}; trying again in {wait_s:g} s")
        await asyncio.sleep(wait_s)
