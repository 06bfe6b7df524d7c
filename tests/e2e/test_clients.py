"""The clients in four languages: before a service that fails in every way, and before real processes."""

import contextlib
import math
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Self

import grpc
import numpy as np
import pytest
import soundfile

from soundstage.music.v1.song_service_pb2 import (
    STAGE_LM,
    Accepted,
    CancelSongRequest,
    CancelSongResponse,
    GenerateSongRequest,
    GenerateSongResponse,
    Progress,
    StreamAudioRequest,
    StreamAudioResponse,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceServicer, add_SongServiceServicer_to_server
from soundstage.type.v1.audio_pb2 import AudioChunk, AudioFormat, AudioHeader, AudioTrailer, Encoding
from soundstage_runtime.errors import InvalidRequestError, OverloadedError, ServiceError, Violation, to_status

CLIENTS = Path(__file__).parents[2] / "clients"
PROGRAMS = {
    "python": [sys.executable, str(CLIENTS / "python/generate.py")],
    "node": ["node", str(CLIENTS / "node/generate.mjs")],
    "go": [str(CLIENTS / "go/build/generate")],
    "cpp": [str(CLIENTS / "cpp/build/generate")],
}
SONG = "songs/1"
CHUNK_FRAMES = 100
NUM_FRAMES = 10 * CHUNK_FRAMES
PCM = np.random.default_rng(0).bytes(NUM_FRAMES * 4)
HEADERS = {"WAV": b"a header", "FLAC": b"another"}  # containers of this service: a header, then PCM
Context = grpc.ServicerContext
SomeMethods: Any = SongServiceServicer  # of which a fake has but those that are called


@pytest.fixture(params=["python", *(pytest.param(x, marks=getattr(pytest.mark, x)) for x in ("node", "go", "cpp"))])
def client(request: pytest.FixtureRequest) -> list[str]:
    """The command of a client, which is built if it must be."""
    folder = CLIENTS / request.param
    if (folder / "Makefile").exists():
        subprocess.run(["make", "--silent", "--directory", str(folder)], check=True)
    return PROGRAMS[request.param]


def audio(encoding: str, first_frame: int, last_frame: int = NUM_FRAMES) -> Iterator[AudioHeader | AudioChunk]:
    """A header, and the song from a frame on."""
    audio_format = AudioFormat(encoding=Encoding.Value(f"ENCODING_{encoding}"), sample_rate_hz=48_000, channels=2)
    yield AudioHeader(format=audio_format, first_frame=first_frame, frame_count=last_frame - first_frame)
    if encoding in HEADERS:
        yield AudioChunk(first_frame=first_frame, data=HEADERS[encoding])
    for frame in range(first_frame, last_frame, CHUNK_FRAMES):
        end = min(frame + CHUNK_FRAMES, last_frame)
        yield AudioChunk(first_frame=frame, frame_count=end - frame, data=PCM[frame * 4 : end * 4])


class Dropping(SomeMethods):
    """Loses the connection of each call after the next of `survivals` pieces of audio, and of later calls never."""

    def __init__(self, survivals: Sequence[int]) -> None:
        self.survivals = list(survivals)
        self.generated: list[GenerateSongRequest] = []
        self.streamed: list[StreamAudioRequest] = []
        self.cancelled = threading.Event()
        self.keys: list[str] = []

    def GenerateSong(self, request: GenerateSongRequest, context: Context) -> Iterator[GenerateSongResponse]:
        self.note_key(context)
        self.generated.append(request)
        yield GenerateSongResponse(accepted=Accepted(song=SONG, seeds=request.seeds or [7]))
        yield GenerateSongResponse(progress=Progress(stage=STAGE_LM, done=1, total=2))
        for piece in self._survivors(request.output.format, 0, context):
            if isinstance(piece, AudioHeader):
                yield GenerateSongResponse(audio_header=piece)
            else:
                yield GenerateSongResponse(audio_chunk=piece)

    def StreamAudio(self, request: StreamAudioRequest, context: Context) -> Iterator[StreamAudioResponse]:
        self.note_key(context)
        self.streamed.append(request)
        assert request.song == SONG
        for piece in self._survivors(request.output.format, request.first_frame, context):
            if isinstance(piece, AudioHeader):
                yield StreamAudioResponse(audio_header=piece)
            else:
                yield StreamAudioResponse(audio_chunk=piece)
        yield StreamAudioResponse(audio_trailer=AudioTrailer(frame_count=NUM_FRAMES - request.first_frame))

    def CancelSong(self, request: CancelSongRequest, context: Context) -> CancelSongResponse:
        assert request.song == SONG
        self.note_key(context)
        self.cancelled.set()
        return CancelSongResponse()

    def note_key(self, context: Context) -> None:
        self.keys += [str(value) for name, value in context.invocation_metadata() if name == "authorization"]

    def _survivors(
        self, audio_format: AudioFormat, first_frame: int, context: Context
    ) -> Iterator[AudioHeader | AudioChunk]:
        num_pieces = self.survivals.pop(0) if self.survivals else None
        name = Encoding.Name(audio_format.encoding).removeprefix("ENCODING_")
        for index, piece in enumerate(audio(name, first_frame)):
            if index == num_pieces:
                break
            yield piece
        if num_pieces is not None:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the wire was cut")


class Endless(Dropping):
    """Sends the beginning of a song, and then nothing until it is told to stop."""

    def __init__(self) -> None:
        super().__init__([])
        self.ended = threading.Event()

    def GenerateSong(self, request: GenerateSongRequest, context: Context) -> Iterator[GenerateSongResponse]:
        context.add_callback(self.ended.set)
        yield from super().GenerateSong(request, context)
        self.ended.wait()


class Refusing(SomeMethods):
    """Refuses every song."""

    def __init__(self, error: ServiceError) -> None:
        self._error = error

    def GenerateSong(self, request: GenerateSongRequest, context: Context) -> NoReturn:
        details = to_status(self._error).SerializeToString()
        context.set_trailing_metadata((("grpc-status-details-bin", details),))
        context.abort(self._error.code, self._error.message)


class Served:
    """A service on a port of its own."""

    def __init__(self, service: SongServiceServicer) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_SongServiceServicer_to_server(service, self._server)
        self._port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> str:
        self._server.start()
        return f"127.0.0.1:{self._port}"

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()


def run(client: list[str], address: str, **flags: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(client, address, **flags), capture_output=True, timeout=120, check=False)


def command(client: list[str], address: str, **flags: Any) -> list[str]:
    flags = {"caption": "a calm piano", "address": address} | flags
    return [*client, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


# Before the header, between header and audio, in the middle, again at once, and behind the last frame.
SURVIVALS = [0, 1, 2, 3, 0, 0, 5, 2, 1, 4]


def test_a_song_piped_through_lost_connections_is_whole(client: list[str]) -> None:
    service = Dropping(SURVIVALS)
    with Served(service) as address:
        done = run(client, address, duration=2.5, seed=9, output="-")
    assert done.returncode == 0, done.stderr
    assert done.stdout == PCM
    asked = service.generated[0]
    assert (asked.caption, asked.metadata.duration_s, list(asked.seeds), asked.detach) == (
        "a calm piano",
        2.5,
        [9],
        True,
    )
    assert [request.first_frame for request in service.streamed] == [0, 0, 100, 300, 300, 300, 700, 800, 800, 1000]
    assert {(request.variant, request.HasField("frame_count")) for request in service.streamed} == {(0, False)}
    for word in (SONG, "STAGE_LM", "frame 1000"):
        assert word in done.stderr.decode()


def test_a_wav_goes_on_behind_its_one_header(client: list[str], tmp_path: Path) -> None:
    service = Dropping([1, 2, 3])
    path = tmp_path / "song.wav"
    with Served(service) as address:
        done = run(client, address, encoding="WAV", output=path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == HEADERS["WAV"] + PCM
    assert [Encoding.Name(r.output.format.encoding) for r in service.streamed] == ["ENCODING_WAV"] + 2 * [
        "ENCODING_PCM"
    ]
    assert [request.first_frame for request in service.streamed] == [0, 0, 200]


def test_a_file_that_cannot_be_joined_begins_again(client: list[str], tmp_path: Path) -> None:
    service = Dropping([8, 5])
    path = tmp_path / "song.flac"
    with Served(service) as address:
        done = run(client, address, encoding="FLAC", output=path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == HEADERS["FLAC"] + PCM
    assert [request.first_frame for request in service.streamed] == [0, 0]


def test_a_pipe_that_cannot_be_joined_ends_with_an_error(client: list[str]) -> None:
    service = Dropping([3])
    with Served(service) as address:
        done = run(client, address, encoding="FLAC", output="-")
    assert done.returncode == 1
    assert done.stdout == HEADERS["FLAC"] + PCM[: CHUNK_FRAMES * 4]
    assert b"on a pipe only PCM and WAV" in done.stderr
    assert service.cancelled.is_set()
    assert service.streamed == []


def test_a_pipe_that_has_nothing_yet_can_begin_again(client: list[str]) -> None:
    service = Dropping([1])
    with Served(service) as address:
        done = run(client, address, encoding="FLAC", output="-")
    assert (done.returncode, done.stdout) == (0, HEADERS["FLAC"] + PCM)


def test_a_key_goes_with_every_call(client: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOUNDSTAGE_KEY", "sesame")
    service = Dropping([3])
    with Served(service) as address:
        done = run(client, address, encoding="FLAC", output="-")
        again = run(client, address, output=tmp_path / "song.pcm")
    assert (done.returncode, again.returncode) == (1, 0)
    assert service.keys == ["Bearer sesame"] * 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_is_short_enough_to_be_read(program: str) -> None:
    [file] = (CLIENTS / program).glob("generate.*")
    assert len(file.read_text().splitlines()) < 120


def test_a_lost_service_is_given_up(client: list[str], tmp_path: Path) -> None:
    service = Dropping(50 * [2])
    service.survivals[1:] = 50 * [0]
    with Served(service) as address:
        done = run(client, address, output=tmp_path / "song.pcm")
    assert done.returncode == 1
    assert b"the wire was cut" in done.stderr
    assert len(service.streamed) == 4


def test_a_service_that_loses_every_file_is_given_up(client: list[str], tmp_path: Path) -> None:
    service = Dropping(50 * [4])
    with Served(service) as address:
        done = run(client, address, encoding="FLAC", output=tmp_path / "song.flac")
    assert done.returncode == 1
    assert len(service.streamed) == 4


def test_bad_fields_are_named_line_by_line(client: list[str], tmp_path: Path) -> None:
    bad = [Violation(field="caption", description="is empty"), Violation(field="seeds[0]", description="is odd")]
    with Served(Refusing(InvalidRequestError(bad))) as address:
        done = run(client, address, output=tmp_path / "song.pcm")
    assert done.returncode == 1
    lines = [line.strip() for line in done.stderr.decode().splitlines()]
    assert {"caption: is empty", "seeds[0]: is odd"} <= set(lines)
    assert any("INVALID_REQUEST" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_full_service_says_when_to_try_again(client: list[str], tmp_path: Path) -> None:
    with Served(Refusing(OverloadedError("all places are taken", retry_after_s=42))) as address:
        done = run(client, address, output=tmp_path / "song.pcm")
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert any("all places are taken" in line for line in lines)
    assert any("QUEUE_FULL" in line for line in lines)
    assert any("again" in line or "retry" in line for line in lines if "42" in line)


def test_ctrl_c_cancels_the_song(client: list[str], tmp_path: Path) -> None:
    service = Endless()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits it where it is ignored
    with Served(service) as address:
        line = command(client, address, output=tmp_path / "song.pcm")
        with subprocess.Popen(line, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            assert any(b"frame 1000" in said for said in process.stderr)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 1
        assert service.cancelled.is_set()
        assert service.ended.wait(60)


def test_a_player_that_goes_away_cancels_the_song(client: list[str]) -> None:
    service = Endless()
    with (
        Served(service) as address,
        subprocess.Popen(
            command(client, address, output="-"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1, errors
        assert service.cancelled.is_set()
        assert b"Traceback" not in errors


def test_a_file_that_cannot_be_written_cancels_the_song(client: list[str], tmp_path: Path) -> None:
    service = Endless()
    path = tmp_path / "nowhere" / "song.pcm"
    with Served(service) as address:
        done = run(client, address, output=path)
    assert done.returncode == 1
    assert str(path) in done.stderr.decode()
    assert service.cancelled.is_set()


def test_an_unknown_encoding_is_refused(client: list[str], tmp_path: Path) -> None:
    service = Endless()
    with Served(service) as address:
        done = run(client, address, encoding="AIFF", output=tmp_path / "song.aiff")
    assert done.returncode != 0
    assert b"AIFF" in done.stderr
    assert service.generated == []


class Wire(socketserver.ThreadingTCPServer):
    """A wire to a gateway; the first connection is cut when so many bytes have come back through it."""

    daemon_threads = True

    def __init__(self, gateway: str, cut_after_bytes: int) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        host, port = gateway.rsplit(":", 1)
        self.far_end = host, int(port)
        self.limits_bytes: list[float] = [cut_after_bytes]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Connection(socketserver.BaseRequestHandler):
    """A connection through a Wire."""

    def handle(self) -> None:
        assert isinstance(self.server, Wire)
        near, left_bytes = self.request, self.server.limits_bytes.pop() if self.server.limits_bytes else math.inf
        with socket.create_connection(self.server.far_end) as far:
            there = threading.Thread(target=pass_on, args=(near, far, math.inf))
            there.start()
            pass_on(far, near, left_bytes)
            there.join()


def pass_on(source: socket.socket, sink: socket.socket, left_bytes: float) -> None:
    """Pass on so many bytes, then close both ends."""
    with contextlib.suppress(OSError):  # one of them is closed already
        while left_bytes > 0 and (data := source.recv(min(65_536, int(min(left_bytes, 65_536))))):
            sink.sendall(data)
            left_bytes -= len(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("encoding", ["PCM", "WAV", "FLAC"])
def test_a_song_of_real_processes_comes_whole_through_a_wire_that_is_cut(
    client: list[str], gateway: str, tmp_path: Path, encoding: str
) -> None:
    unbroken, joined = tmp_path / "unbroken", tmp_path / "joined"
    flags = {"duration": 4, "seed": 7, "encoding": encoding}
    done = run(client, gateway, output=unbroken, **flags)
    assert done.returncode == 0, done.stderr
    with Wire(gateway, cut_after_bytes=300_000) as wire:
        done = run(client, wire.address, output=joined, **flags)
    assert done.returncode == 0, done.stderr
    assert b"the connection was lost" in done.stderr
    assert joined.read_bytes() == unbroken.read_bytes()
    if encoding == "PCM":
        assert unbroken.stat().st_size == 4 * 48_000 * 4
    else:
        assert soundfile.info(unbroken).frames == 4 * 48_000


def test_the_gateway_names_the_bad_field_in_every_language(client: list[str], gateway: str, tmp_path: Path) -> None:
    done = run(client, gateway, duration=10_000, output=tmp_path / "song.pcm")
    assert done.returncode == 1
    lines = [line.strip() for line in done.stderr.decode().splitlines()]
    assert "metadata.duration_s: is 10000; must be 1 to 600" in lines
