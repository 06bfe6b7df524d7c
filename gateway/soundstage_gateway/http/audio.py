"""A song's audio: as it is decoded while it is new, as a file with ranges afterwards."""

import hashlib
import re
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing, suppress
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import numpy as np
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Receive, Scope, Send

from soundstage.music.v1.song_service_pb2 import OutputOptions, StreamAudioRequest, StreamAudioResponse
from soundstage.type.v1.audio_pb2 import (
    ENCODING_PCM,
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_S24,
    AudioFormat,
)
from soundstage_gateway.audio_format import EXTENSIONS, Output, media_type, read_output
from soundstage_gateway.http.errors import RangeError, RouteUnknownError
from soundstage_gateway.http.file import SongFile
from soundstage_gateway.http.live import LiveResponse
from soundstage_gateway.http.thread import run_to_end
from soundstage_gateway.http.wire import NO_CALL, Query
from soundstage_gateway.order import MAX_VARIANTS
from soundstage_gateway.servicer import SongServicer
from soundstage_gateway.shelf import Place, Shelf
from soundstage_gateway.store import PREFIX
from soundstage_gateway.studio import Studio
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.wav import write_lengths

_SAMPLE_FORMATS: Final = {"s16": SAMPLE_FORMAT_S16, "s24": SAMPLE_FORMAT_S24, "f32": SAMPLE_FORMAT_F32}
_FROM_THE_START: Final = re.compile("bytes=0-", re.IGNORECASE)
_RANGE: Final = re.compile(
    "bytes=(?:(?P<first>[0-9]{1,18})-(?P<last>[0-9]{0,18})|-(?P<tail>[0-9]{1,18}))", re.IGNORECASE
)
_FILE: Final = "audio"
_CONTAINERS: Final = {"mp3": "mp3", "m4a": "mp4", "webm": "webm"}  # whose files say more than their streams


class Listening:
    """Plays songs to HTTP clients; whole files go on the shelf."""

    def __init__(self, servicer: SongServicer, studio: Studio, shelf: Shelf) -> None:
        self._servicer = servicer
        self._studio = studio
        self._shelf = shelf

    async def play(self, request: Request) -> Response:
        """GET /v1/songs/{id}/audio.{extension}.

        What is decoded already is a file, and so is what is asked for as one: by a range that begins later, or for
        download. All else is sent as it is decoded, at the pace that max_buffer_s asks for.
        """
        song, extension = f"{PREFIX}{request.path_params['id']}", request.path_params["extension"]
        kept = await self._studio.find(song)
        if extension not in EXTENSIONS:
            raise RouteUnknownError(
                f"audio.{extension[:16]} is none of {', '.join(f'audio.{name}' for name in EXTENSIONS)}"
            )
        wanted, output, is_download = _read(request, song, extension)
        headers = {"Content-Type": media_type(output.format)}
        if is_download:
            name = f"soundstage-{request.path_params['id'][:8]}-{wanted.variant}.{extension}"
            headers["Content-Disposition"] = f'attachment; filename="{name}"'
        is_made = any(found.frame_count for found in kept.song.variants[wanted.variant :][:1])
        if is_made and output.max_buffer_s is None:
            file = await self._find_file(request, wanted, extension, headers, is_download=is_download)
            if file is not None:
                return file
        events = self._servicer.StreamAudio(wanted, NO_CALL)
        # What comes first may be an error, and then it is the answer, to HEAD too.
        await anext(events)
        first = (await anext(events)).audio_chunk.data
        return LiveResponse(_join(first, events), headers)

    async def _find_file(
        self,
        request: Request,
        wanted: StreamAudioRequest,
        extension: str,
        headers: dict[str, str],
        *,
        is_download: bool,
    ) -> Response | None:
        """Return a song as a file; None where it is better sent as it is decoded."""
        asked = request.headers.get("range", "")
        is_part = _RANGE.fullmatch(asked) is not None and not _FROM_THE_START.fullmatch(asked)
        tag = hashlib.sha256(wanted.SerializeToString(deterministic=True)).hexdigest()[:32]
        with ExitStack() as stack:
            place = stack.enter_context(self._shelf.hold(f"{request.path_params['id']}-{wanted.variant}-{tag}"))
            file = place.folder / _FILE
            if not (is_part or is_download or file.exists()):
                async with self._studio.tape(wanted.song, wanted.variant) as tape:
                    if not tape.is_whole:
                        return None
            await self._fill(place, wanted, extension)
            headers = {**headers, "ETag": f'"{tag}"'}
            known = request.headers.get("if-none-match", "")
            if headers["ETag"] in known or known.strip() == "*":
                return Response(status_code=304, headers=headers)
            return _HeldFile(file, headers, stack.pop_all())

    async def _fill(self, place: Place, wanted: StreamAudioRequest, extension: str) -> None:
        """Write the file, unless it is there."""
        async with place.lock:
            file = place.folder / _FILE
            if file.exists():
                return
            with NamedTemporaryFile(dir=place.folder) as raw:
                write = self._write_anew if extension in _CONTAINERS else self._write_as_streamed
                await write(Path(raw.name), file, wanted, extension)

    async def _write_as_streamed(self, raw: Path, file: Path, wanted: StreamAudioRequest, extension: str) -> None:
        """Write what a stream has, and of WAV the length."""

        def finish() -> None:
            if extension == "wav":
                write_lengths(out)
            out.close()
            _keep(raw, file)

        with raw.open("r+b") as out:
            async with aclosing(self._servicer.StreamAudio(wanted, NO_CALL)) as events:
                async for event in events:
                    out.write(event.audio_chunk.data)
            await run_to_end(finish)

    async def _write_anew(self, raw: Path, file: Path, wanted: StreamAudioRequest, extension: str) -> None:
        """Encode to a file that can be rewound, as a stream cannot."""
        audio_format = wanted.output.format
        options = {"movflags": "+faststart", "movie_timescale": str(audio_format.sample_rate_hz)}  # else of 1 ms
        out = SongFile(raw, _CONTAINERS[extension], options if extension == "m4a" else {}, audio_format)

        def finish() -> None:
            out.close()
            _keep(raw, file)

        plain = StreamAudioRequest()
        plain.CopyFrom(wanted)
        plain.output.format.CopyFrom(
            AudioFormat(
                encoding=ENCODING_PCM,
                sample_format=SAMPLE_FORMAT_F32,
                sample_rate_hz=audio_format.sample_rate_hz,
                channels=audio_format.channels,
            )
        )
        try:
            async with aclosing(self._servicer.StreamAudio(plain, NO_CALL)) as events:
                async for event in events:
                    samples = np.frombuffer(event.audio_chunk.data, "<f4").reshape(-1, audio_format.channels)
                    await run_to_end(partial(out.feed, samples))
            await run_to_end(finish)
        finally:
            out.abandon()


class _HeldFile(FileResponse):
    """Sends a file, or the part that a Range header asks for, and lets its place go when it is sent."""

    def __init__(self, path: Path, headers: dict[str, str], held: ExitStack) -> None:
        super().__init__(path, headers=headers)
        self._size_bytes = path.stat().st_size
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; of several parts none, but the whole."""
        with self._held:
            asked = Headers(scope=scope)
            if "if-range" not in asked and not _is_part(asked.get("range", ""), self._size_bytes):
                scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"range"]}
            await super().__call__(scope, receive, send)


async def _join(first: bytes, events: AsyncGenerator[StreamAudioResponse, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        yield first
        async for event in events:
            if event.audio_chunk.data:
                yield event.audio_chunk.data


def _read(request: Request, song: str, extension: str) -> tuple[StreamAudioRequest, Output, bool]:
    """Read what a query asks for, every default filled in, and whether it is for download."""
    query = Query(request)
    wanted = StreamAudioRequest(song=song, variant=query.whole("variant", 0, MAX_VARIANTS - 1) or 0)
    options = OutputOptions(format=EXTENSIONS[extension])
    for name in ("sample_rate_hz", "channels", "bit_rate_bps"):
        setattr(options.format, name, query.whole(name) or 0)
    for name in ("gain_db", "peak_dbfs", "fade_in_s", "fade_out_s", "max_buffer_s"):
        value = query.number(name)
        if value is not None:
            setattr(options, name, value)
    sample_format = query.text("sample_format")
    if sample_format in _SAMPLE_FORMATS:
        options.format.sample_format = _SAMPLE_FORMATS[sample_format]
    elif sample_format is not None:
        query.checks.refuse("sample_format", f"is {sample_format[:40]!r}; must be one of {', '.join(_SAMPLE_FORMATS)}")
    download = query.whole("download", 0, 1)
    output = read_output(query.checks, options, can_normalise=True)
    try:
        query.finish()
    except InvalidRequestError as error:  # in a query the fields have no path
        raise InvalidRequestError(
            [Violation(field=v.field.rpartition(".")[2], description=v.description) for v in error.violations]
        ) from error
    wanted.output.CopyFrom(options)
    wanted.output.format.CopyFrom(output.format)
    return wanted, output, download == 1


def _is_part(asked: str, size_bytes: int) -> bool:
    """Tell whether a Range header asks for one part of a file; raises RangeError for a part that is not in it."""
    found = _RANGE.fullmatch(asked)
    if found is None or (found["last"] and int(found["first"]) > int(found["last"])):
        return False
    is_inside = int(found["first"]) < size_bytes if found["first"] else int(found["tail"]) > 0
    if not is_inside:
        message = f"Range is {asked!r}; the file has bytes 0 to {size_bytes - 1}"
        raise RangeError(message, metadata={"size_bytes": str(size_bytes)})
    return True


def _keep(raw: Path, file: Path) -> None:
    with suppress(FileExistsError):  # by a request that was left in the middle: it has the same bytes
        file.hardlink_to(raw)
