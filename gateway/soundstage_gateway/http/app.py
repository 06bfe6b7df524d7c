"""The routes of the gateway's HTTP port."""

import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Match, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.catalog_service_pb2 import GetCapabilitiesRequest, ListAdaptersRequest, ListModelsRequest
from soundstage.music.v1.song_service_pb2 import (
    AlignLyricsRequest,
    CancelSongRequest,
    CreateSongRequest,
    DeleteSongRequest,
    GenerateSongRequest,
    GetSongRequest,
    ListSongsRequest,
)
from soundstage_gateway.audio_servicer import MAX_FILE_BYTES, MAX_MESSAGE_BYTES
from soundstage_gateway.catalog_servicer import DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE
from soundstage_gateway.http.audio import Listening
from soundstage_gateway.http.events import follow
from soundstage_gateway.http.gate import Gate
from soundstage_gateway.http.hls import IDLE_S, Broadcasts
from soundstage_gateway.http.names import Names
from soundstage_gateway.http.wire import NO_CALL, Query, read_message, refusal, write_message
from soundstage_gateway.keys import Keys
from soundstage_gateway.metrics import Metrics
from soundstage_gateway.order import MAX_VARIANTS
from soundstage_gateway.servicer import Offer, check_request_id
from soundstage_gateway.shelf import Shelf
from soundstage_gateway.store import PREFIX
from soundstage_gateway.studio import Studio

P = TypeVar("P", ListSongsRequest, ListModelsRequest, ListAdaptersRequest)
_PAGE: Final = Path(__file__).parent / "static"
_POLICY: Final = "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
_BINS: Final = 600
_MAX_BINS: Final = 4000
_SEQUENCE: Final = re.compile("[0-9]{1,18}")


class Api:
    """What a gateway offers over HTTP; `app` serves it."""

    def __init__(
        self,
        offer: Offer,
        studio: Studio,
        shelf: Shelf,
        keys: Keys | None,
        metrics: Metrics,
        *,
        stall_timeout_s: float,
        hls_idle_s: float = IDLE_S,
        names: Names | None = None,
    ) -> None:
        self._offer = offer
        self._studio = studio
        self._metrics = metrics
        self._listening = Listening(offer.song, studio, shelf)
        self._broadcasts = Broadcasts(offer.song, studio, shelf, idle_s=hls_idle_s)
        self.is_draining = False
        song = "/v1/songs/{id}"
        router = _Routes(
            [
                Route("/v1/songs", self.create_song, methods=["POST"]),
                Route("/v1/songs", self.list_songs, methods=["GET"]),
                Route(song, self.get_song, methods=["GET"]),
                Route(song, self.delete_song, methods=["DELETE"]),
                Route(f"{song}/cancel", self.cancel_song, methods=["POST"]),
                Route(f"{song}/events", self.watch_song, methods=["GET"]),
                Route(f"{song}/audio.{{extension}}", self._listening.play, methods=["GET"]),
                Route(f"{song}/waveform", self.draw_waveform, methods=["GET"]),
                Route(f"{song}/lyrics", self.align_lyrics, methods=["GET"]),
                Route(f"{song}/hls/index.m3u8", self._broadcasts.list_segments, methods=["GET"]),
                Route(f"{song}/hls/{{file}}", self._broadcasts.send_segment, methods=["GET"]),
                Route("/v1/assets", self.upload_audio, methods=["POST"]),
                Route("/v1/capabilities", self.get_capabilities, methods=["GET"]),
                Route("/v1/models", self.list_models, methods=["GET"]),
                Route("/v1/adapters", self.list_adapters, methods=["GET"]),
                Route("/healthz", self.tell_health, methods=["GET"]),
                Route("/metrics", self.tell_metrics, methods=["GET"]),
                Route("/", self.show_page, methods=["GET"]),
                Mount("/static", StaticFiles(directory=_PAGE, check_dir=False)),
            ],
            redirect_slashes=False,
        )
        self.app = Gate(router, keys, names or Names("127.0.0.1"), metrics, stall_timeout_s=stall_timeout_s)

    async def close(self) -> None:
        """Stop what goes on without a request."""
        await self._broadcasts.close()

    async def create_song(self, request: Request) -> Response:
        """POST /v1/songs."""
        Query(request).finish()
        wanted = CreateSongRequest(request_id=request.headers.get("idempotency-key", ""))
        check_request_id("Idempotency-Key", wanted.request_id)
        wanted.request.CopyFrom(await read_message(request, GenerateSongRequest))
        answer = await self._offer.song.CreateSong(wanted, NO_CALL)
        return JSONResponse(write_message(answer), 201, {"Location": f"/v1/{answer.song.name}"})

    async def list_songs(self, request: Request) -> Response:
        """GET /v1/songs."""
        answer = await self._offer.song.ListSongs(_read_page(request, ListSongsRequest()), NO_CALL)
        return JSONResponse({"songs": [], "nextPageToken": "", **write_message(answer)})

    async def get_song(self, request: Request) -> Response:
        """GET /v1/songs/{id}."""
        Query(request).finish()
        return JSONResponse(write_message(await self._offer.song.GetSong(GetSongRequest(song=_song(request)), NO_CALL)))

    async def delete_song(self, request: Request) -> Response:
        """DELETE /v1/songs/{id}."""
        Query(request).finish()
        await self._offer.song.DeleteSong(DeleteSongRequest(song=_song(request)), NO_CALL)
        return Response(status_code=204)

    async def cancel_song(self, request: Request) -> Response:
        """POST /v1/songs/{id}/cancel."""
        Query(request).finish()
        answer = await self._offer.song.CancelSong(CancelSongRequest(song=_song(request)), NO_CALL)
        return JSONResponse(write_message(answer))

    async def watch_song(self, request: Request) -> Response:
        """GET /v1/songs/{id}/events."""
        Query(request).finish()
        kept = await self._studio.find(_song(request))
        last = request.headers.get("last-event-id", "")
        if last and not _SEQUENCE.fullmatch(last):
            raise refusal("Last-Event-ID", f"is {last[:40]!r}; give the id of an event that came before")
        return await follow(self._offer.song, kept.name, after=int(last) if last else None)

    async def draw_waveform(self, request: Request) -> Response:
        """GET /v1/songs/{id}/waveform."""
        query = Query(request)
        variant = query.whole("variant", 0, MAX_VARIANTS - 1) or 0
        num_bins = query.whole("bins", 1, _MAX_BINS) or _BINS
        query.finish()
        kept = await self._studio.find(_song(request))
        is_made = all(found.frame_count for found in kept.song.variants[variant:][:1])
        if not is_made:
            return JSONResponse({"numBins": num_bins, "bins": []})
        async with self._studio.tape(kept.name, variant) as tape:
            return JSONResponse({"numBins": num_bins, "bins": tape.overview(num_bins).tolist()})

    async def align_lyrics(self, request: Request) -> Response:
        """GET /v1/songs/{id}/lyrics."""
        query = Query(request)
        wanted = AlignLyricsRequest(song=_song(request), variant=query.whole("variant", 0, MAX_VARIANTS - 1) or 0)
        query.finish()
        return JSONResponse(write_message(await self._offer.song.AlignLyrics(wanted, NO_CALL)))

    async def upload_audio(self, request: Request) -> Response:
        """POST /v1/assets."""
        Query(request).finish()
        if int(request.headers.get("content-length", 0)) > MAX_FILE_BYTES:
            raise refusal("data", f"is more than {MAX_FILE_BYTES} bytes; send a shorter file, or a compressed one")
        return JSONResponse(write_message(await self._offer.audio.UploadAudio(_pieces(request), NO_CALL)), 201)

    async def get_capabilities(self, request: Request) -> Response:
        """GET /v1/capabilities."""
        Query(request).finish()
        answer = await self._offer.catalog.GetCapabilities(GetCapabilitiesRequest(), NO_CALL)
        return JSONResponse(write_message(answer))

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        answer = await self._offer.catalog.ListModels(_read_page(request, ListModelsRequest()), NO_CALL)
        return JSONResponse({"models": [], "nextPageToken": "", **write_message(answer)})

    async def list_adapters(self, request: Request) -> Response:
        """GET /v1/adapters."""
        answer = await self._offer.catalog.ListAdapters(_read_page(request, ListAdaptersRequest()), NO_CALL)
        return JSONResponse({"adapters": [], "nextPageToken": "", **write_message(answer)})

    async def tell_health(self, request: Request) -> Response:
        """GET /healthz."""
        status = "NOT_SERVING" if self.is_draining else "SERVING"
        return JSONResponse({"status": status}, 503 if self.is_draining else 200)

    async def tell_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self._metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def show_page(self, request: Request) -> Response:
        """GET /."""
        return FileResponse(_PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})


class _Routes(Router):
    """Routes; whoever comes with a wrong method is told what all routes of the path take together."""

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        try:
            await super().app(scope, receive, send)
        except HTTPException as error:
            if error.status_code != 405:
                raise
            here = [
                route for route in self.routes if isinstance(route, Route) and route.matches(scope)[0] != Match.NONE
            ]
            allowed = {method for route in here for method in route.methods or ()} or {"GET", "HEAD"}  # of files
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(allowed))}) from error


def _song(request: Request) -> str:
    return f"{PREFIX}{request.path_params['id']}"


def _read_page(request: Request, page: P) -> P:
    query = Query(request)
    page.page_size = query.whole("page_size", 1, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE
    page.page_token = query.text("page_token") or ""
    query.finish()
    return page


async def _pieces(request: Request) -> AsyncGenerator[UploadAudioRequest, None]:
    async for piece in request.stream():
        for start in range(0, len(piece), MAX_MESSAGE_BYTES):
            yield UploadAudioRequest(data=piece[start : start + MAX_MESSAGE_BYTES])
