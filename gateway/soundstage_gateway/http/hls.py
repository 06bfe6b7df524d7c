"""HTTP Live Streaming: a song as a playlist of segments, from its first two seconds on."""

import asyncio
import re
import shutil
from collections.abc import Generator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import grpc
from starlette.requests import Request
from starlette.responses import Response

from soundstage.music.v1.song_service_pb2 import OutputOptions, StreamAudioRequest
from soundstage.type.v1.audio_pb2 import ENCODING_MP4_AAC, ENCODING_PCM, SAMPLE_FORMAT_F32, AudioFormat
from soundstage_gateway.http.file import SongFile
from soundstage_gateway.http.thread import run_to_end
from soundstage_gateway.http.wire import NO_CALL, Query
from soundstage_gateway.order import MAX_VARIANTS
from soundstage_gateway.servicer import SongServicer
from soundstage_gateway.shelf import Shelf
from soundstage_gateway.store import PREFIX
from soundstage_gateway.studio import Studio
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.pcm import from_bytes
from soundstage_runtime.score import CHANNELS, SAMPLE_RATE_HZ

IDLE_S: Final = 60.0
_SEGMENT_S: Final = 2
_AAC: Final = AudioFormat(
    encoding=ENCODING_MP4_AAC, sample_rate_hz=SAMPLE_RATE_HZ, channels=CHANNELS, bit_rate_bps=192_000
)
_INDEX: Final = "index.m3u8"
_END: Final = "#EXT-X-ENDLIST"
_FILE: Final = re.compile(r'(?<=^#EXT-X-MAP:URI=")[^"]+|^[^#\n]+', re.MULTILINE)


class SegmentUnknownError(ServiceError):
    """The playlist has no such segment, or not yet."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "SEGMENT_UNKNOWN"


class Broadcasts:
    """Segments of songs, encoded once for all listeners and kept on the shelf.

    A playlist that is asked for begins the encoding, which takes one listener's place and ends when nobody has asked
    for anything of it for `idle_s`. Encoded once more, a song has the same segments.
    """

    def __init__(self, servicer: SongServicer, studio: Studio, shelf: Shelf, *, idle_s: float) -> None:
        self._servicer = servicer
        self._studio = studio
        self._shelf = shelf
        self._idle_s = idle_s
        self._running: dict[str, _Broadcast] = {}

    async def close(self) -> None:
        """End all encodings."""
        broadcasts = list(self._running.values())
        for broadcast in broadcasts:
            broadcast.leave()
        await asyncio.gather(*(broadcast.work for broadcast in broadcasts), return_exceptions=True)

    async def list_segments(self, request: Request) -> Response:
        """GET /v1/songs/{id}/hls/index.m3u8: as soon as there is a segment."""
        song, variant, name = await self._read(request)
        with self._shelf.hold(name) as place:
            index = place.folder / _INDEX
            while not _is_whole(index):
                if name not in self._running:
                    broadcast = self._running[name] = _Broadcast(self._idle_s)
                    broadcast.work = asyncio.create_task(self._encode(broadcast, name, song, variant))
                broadcast = self._running[name]
                with broadcast.asked():
                    await broadcast.begun.wait()
                if broadcast.error is not None:
                    raise broadcast.error
                if not broadcast.is_left:
                    break
                await asyncio.wait({broadcast.work})  # its segments go with it
            playlist = index.read_text()
        if request.url.query:  # with it come the variant and the key, which the segments need too
            playlist = _FILE.sub(lambda found: f"{found[0]}?{request.url.query}", playlist)
        return Response(playlist, media_type="application/vnd.apple.mpegurl", headers={"Cache-Control": "no-cache"})

    async def send_segment(self, request: Request) -> Response:
        """GET /v1/songs/{id}/hls/{file}: a segment that the playlist has."""
        _, _, name = await self._read(request)
        file = request.path_params["file"]
        with self._shelf.hold(name) as place:
            index = place.folder / _INDEX
            if not index.exists() or file not in _FILE.findall(index.read_text()):
                raise SegmentUnknownError(f"there is no segment {file[:40]!r}; the playlist names those there are")
            data = (place.folder / file).read_bytes()
        if name in self._running:
            with self._running[name].asked():
                pass
        return Response(data, media_type="audio/mp4", headers={"Cache-Control": "private, max-age=3600"})

    async def _read(self, request: Request) -> tuple[str, int, str]:
        """Return the song, the variant and the name of its place; raises ServiceError."""
        query = Query(request)
        variant = query.whole("variant", 0, MAX_VARIANTS - 1) or 0
        query.finish()
        kept = await self._studio.find(f"{PREFIX}{request.path_params['id']}")
        num_variants = len(kept.song.variants)
        if variant >= num_variants:
            query.checks.refuse("variant", f"is {variant}; {kept.name} has variants 0 to {num_variants - 1}")
            query.checks.finish()
        return kept.name, variant, f"{request.path_params['id']}-{variant}-hls"

    async def _encode(self, broadcast: "_Broadcast", name: str, song: str, variant: int) -> None:
        output = OutputOptions(format=AudioFormat(encoding=ENCODING_PCM, sample_format=SAMPLE_FORMAT_F32))
        wanted = StreamAudioRequest(song=song, variant=variant, output=output)
        with self._shelf.hold(name) as place:
            segments = None
            try:
                segments = _open_segments(place.folder)
                async with aclosing(self._servicer.StreamAudio(wanted, NO_CALL)) as events:
                    async for event in events:
                        if event.HasField("audio_chunk"):
                            samples = from_bytes(event.audio_chunk.data, SAMPLE_FORMAT_F32)
                            await run_to_end(partial(segments.feed, samples))
                        if (place.folder / _INDEX).exists():
                            broadcast.begun.set()
                await run_to_end(segments.close)
            except BaseException as error:
                if not _is_whole(place.folder / _INDEX):
                    # Without its folder the encoder cannot write that the song ends here.
                    shutil.rmtree(place.folder)
                    if segments:
                        segments.abandon()
                    place.folder.mkdir()
                if not isinstance(error, Exception):
                    raise
                broadcast.error = error
            finally:
                del self._running[name]
                broadcast.begun.set()


class _Broadcast:
    """An encoding under way: `begun` is set when there is a segment, or an end. What `is_left` ends without one."""

    def __init__(self, idle_s: float) -> None:
        self.is_left = False
        self.begun = asyncio.Event()
        self.error: Exception | None = None
        self.work: asyncio.Task[None]
        self._idle_s = idle_s
        self._num_asking = 0
        self._idle: asyncio.TimerHandle | None = None

    @contextmanager
    def asked(self) -> Generator[None, None, None]:
        """Keep it from ending, and for a while after."""
        self._num_asking += 1
        if self._idle is not None:
            self._idle.cancel()
        try:
            yield
        finally:
            self._num_asking -= 1
            if not self._num_asking:
                self._idle = asyncio.get_running_loop().call_later(self._idle_s, self.leave)

    def leave(self) -> None:
        """End it, if it has not ended."""
        self.is_left = not self.work.done()
        self.work.cancel()


def _is_whole(index: Path) -> bool:
    return index.exists() and _END in index.read_text()


def _open_segments(folder: Path) -> SongFile:
    """Open AAC in fragmented MP4 files, with a playlist that grows."""
    options = {
        "hls_time": str(_SEGMENT_S),
        "hls_playlist_type": "event",
        "hls_segment_type": "fmp4",
        "hls_fmp4_init_filename": "init.mp4",
        "hls_segment_filename": str(folder / "%d.m4s"),
        "avoid_negative_ts": "disabled",  # what comes before 0 is the codec's delay, and the edit list leaves it out
    }
    return SongFile(folder / _INDEX, "hls", options, _AAC)
