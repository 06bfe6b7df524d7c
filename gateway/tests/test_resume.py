"""A stream that is lost goes on from the very sample: the joined audio equals the unbroken one."""

import asyncio
import io
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import av
import grpc
import grpc.aio
import numpy as np
import pytest
from numpy.typing import NDArray

from soundstage.music.v1.song_service_pb2 import (
    CreateSongRequest,
    GenerateSongRequest,
    OutputOptions,
    StreamAudioRequest,
    StreamAudioResponse,
    WatchSongRequest,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.stage.v1.vae_service_pb2 import DecodeRequest, DecodeResponse
from soundstage.type.v1.audio_pb2 import (
    ENCODING_FLAC,
    ENCODING_MP3,
    ENCODING_MP4_AAC,
    ENCODING_MP4_OPUS,
    ENCODING_OGG_OPUS,
    ENCODING_PCM,
    ENCODING_WAV,
    ENCODING_WEBM_OPUS,
    SAMPLE_FORMAT_F32,
    SAMPLE_FORMAT_S16,
    SAMPLE_FORMAT_S24,
    AudioFormat,
)
from soundstage_runtime import pcm

from .conftest import Context, Deploy, Deployment, Steady

SECONDS = 6
LONG_SECONDS = 26  # the last of them are far from the first, as a tape sees it
LOSSES = 200
NOISE = np.random.default_rng(5).normal(0, 0.1, (LONG_SECONDS * 48_000, 2))
TIME_S = np.arange(LONG_SECONDS * 48_000)[:, None] / 48_000
# A rising tone, so that every place sounds like itself alone, and some noise.
SONG = (0.4 * np.sin(2 * np.pi * (300 * TIME_S + 250 * TIME_S**2)) + 0.05 * NOISE).astype(np.float32)
EXACT = [
    AudioFormat(encoding=ENCODING_PCM, sample_format=SAMPLE_FORMAT_S16),
    AudioFormat(encoding=ENCODING_PCM, sample_format=SAMPLE_FORMAT_F32, sample_rate_hz=44_100),
    AudioFormat(encoding=ENCODING_PCM, sample_format=SAMPLE_FORMAT_S24, channels=1, sample_rate_hz=24_000),
    AudioFormat(encoding=ENCODING_WAV, sample_format=SAMPLE_FORMAT_S16, sample_rate_hz=44_100),
    AudioFormat(encoding=ENCODING_WAV, sample_format=SAMPLE_FORMAT_F32),
    AudioFormat(encoding=ENCODING_FLAC, sample_format=SAMPLE_FORMAT_S16),
    AudioFormat(encoding=ENCODING_FLAC, sample_format=SAMPLE_FORMAT_S24, channels=1),
]
CODEC_FRAMES = {
    ENCODING_MP3: 1152,
    ENCODING_MP4_AAC: 1024,
    ENCODING_OGG_OPUS: 960,
    ENCODING_WEBM_OPUS: 960,
    ENCODING_MP4_OPUS: 960,
}


class Musical(Steady):
    """A codec that decodes every song to SONG."""

    async def Decode(
        self, request_iterator: AsyncIterator[DecodeRequest], context: Context
    ) -> AsyncIterator[DecodeResponse]:
        setup = (await anext(request_iterator)).setup
        async for _ in request_iterator:
            pass
        start, stop = setup.first_frame, setup.first_frame + setup.frame_count
        for chunk, peak in pcm.audio_chunks(SONG[start:stop], first_frame=start, sample_format=setup.sample_format):
            yield DecodeResponse(audio=chunk, peak=peak)


class Cutter:
    """A proxy that breaks each connection when so many bytes have gone to the client as `draw` says."""

    def __init__(self, port: int, draw: Callable[[], int]) -> None:
        self._port, self._draw = port, draw
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        ways = [
            asyncio.create_task(_pass_on(reader, far_writer)),
            asyncio.create_task(_pass_on(far_reader, writer, limit_bytes=self._draw())),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (writer, far_writer):
                end.transport.abort()
            await asyncio.gather(*ways, return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, limit_bytes: int = 1 << 40) -> None:
    with suppress(ConnectionError):
        while limit_bytes and (data := await reader.read(min(limit_bytes, 1 << 16))):
            limit_bytes -= len(data)
            writer.write(data)
            await writer.drain()


@dataclass
class Part:
    """What came before a connection was lost: bytes, and the frames that they complete."""

    data: bytes
    frame_count: int
    delay_frames: int


@dataclass
class Listener:
    """Listens to a song through connections that break, and goes on from any frame that it has heard.

    `places` are where it began, and `num_undecoded` counts how often that was before all was decoded.
    """

    deployment: Deployment
    port: int
    song: str
    output: OutputOptions
    chance: random.Random
    places: list[int] = field(default_factory=list[int])
    num_undecoded: int = 0

    async def listen(self, song_frames: int) -> list[Part]:
        """Listen to the end; of what comes before a loss, something at the end is thrown away."""
        parts: list[Part] = []
        place = 0
        while place < song_frames:
            part, is_lost = await self._listen_once(place)
            if is_lost and part.frame_count:
                part.frame_count = self.chance.randint(1, part.frame_count)
            if part.frame_count:
                parts.append(part)
                self.places.append(place)
                async with self.deployment.studio.tape(self.song, 0) as tape:
                    self.num_undecoded += not tape.is_whole
            place += part.frame_count
        assert place == song_frames
        return parts

    async def _listen_once(self, first_frame: int) -> tuple[Part, bool]:
        part = Part(b"", 0, 0)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=options) as channel:
            request = StreamAudioRequest(song=self.song, first_frame=first_frame, output=self.output)
            try:
                async for event in SongServiceStub(channel).StreamAudio(request):
                    if event.HasField("audio_header"):
                        part.delay_frames = event.audio_header.encoder_delay_frames
                    elif event.HasField("audio_chunk"):
                        assert event.audio_chunk.first_frame == first_frame + part.frame_count
                        part.data += event.audio_chunk.data
                        part.frame_count += event.audio_chunk.frame_count
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                return part, True
        return part, False


async def make(deployment: Deployment, seconds: int = SECONDS) -> str:
    request = GenerateSongRequest(caption="x", codes=[0] * (seconds * 5))
    call = SongServiceStub(deployment.channel).CreateSong(CreateSongRequest(request=request))
    song = (await call).song.name
    async for _ in SongServiceStub(deployment.channel).WatchSong(WatchSongRequest(song=song)):
        pass
    return song


async def listen_whole(deployment: Deployment, song: str, audio_format: AudioFormat) -> Part:
    listener = Listener(deployment, deployment.port, song, OutputOptions(format=audio_format), random.Random())
    header = await first_event(deployment, song, audio_format)
    [part] = await listener.listen(header.audio_header.frame_count)
    return part


async def first_event(deployment: Deployment, song: str, audio_format: AudioFormat) -> StreamAudioResponse:
    call = SongServiceStub(deployment.channel).StreamAudio(
        StreamAudioRequest(song=song, output=OutputOptions(format=audio_format))
    )
    event = await anext(aiter(call))  # pyright: ignore[reportArgumentType]
    call.cancel()
    return event


def decode(part: Part) -> NDArray[np.floating]:
    """Decode a part that may end anywhere to samples [frames, channels], the encoder's delay left out."""
    if not part.frame_count:
        return np.empty((0, 0))
    frames: list[NDArray[np.floating]] = []
    with av.open(io.BytesIO(part.data), "r") as container:
        channels = container.streams.audio[0].codec_context.channels
        for frame in container.decode(audio=0):
            words = frame.to_ndarray()
            by_frame = words.T if frame.format.is_planar else words.reshape(-1, channels)
            frames.append(
                by_frame / (2.0**31 if words.dtype == np.int32 else 2.0**15 if words.dtype == np.int16 else 1)
            )
    return np.concatenate(frames)[part.delay_frames :][: part.frame_count]


def samples_of(part: Part, audio_format: AudioFormat) -> bytes:
    """The bytes of a part's samples: of PCM all, of WAV what follows the header, of FLAC what it decodes to."""
    if audio_format.encoding == ENCODING_FLAC:
        return decode(part).tobytes()
    body = part.data.partition(b"data")[2][4:] if audio_format.encoding == ENCODING_WAV else part.data
    size_bytes = {SAMPLE_FORMAT_S16: 2, SAMPLE_FORMAT_S24: 3, SAMPLE_FORMAT_F32: 4}[audio_format.sample_format]
    return body[: part.frame_count * size_bytes * (audio_format.channels or 2)]


@pytest.mark.parametrize(
    ("tape_limit_bytes", "least_undecoded"),
    [
        pytest.param(1, LOSSES // 2, id="decoded-anew", marks=pytest.mark.soak),
        pytest.param(64 << 20, 1, id="decoded-once"),
    ],
)
async def test_after_two_hundred_losses_pcm_wav_and_flac_are_what_they_would_have_been(
    deploy: Deploy, tape_limit_bytes: int, least_undecoded: int
) -> None:
    """Connections break anywhere, also while the song is still being decoded, and before or beyond what is."""
    chance = random.Random(1)
    async with deploy(Musical("vae"), tape_limit_bytes=tape_limit_bytes) as deployment:
        song = await make(deployment, LONG_SECONDS)
        whole = [await listen_whole(deployment, song, audio_format) for audio_format in EXACT]
        songs = [await make(deployment, LONG_SECONDS) for _ in range(6)]  # not decoded yet
        places: list[int] = []
        num_undecoded = 0
        async with Cutter(deployment.port, lambda: chance.randrange(500, 1_500_000)) as cutter:
            while len(places) < LOSSES:
                number = chance.randrange(len(EXACT))
                song = songs.pop() if songs else song
                listener = Listener(deployment, cutter.port, song, OutputOptions(format=EXACT[number]), chance)
                parts = await listener.listen(whole[number].frame_count)
                joined = b"".join(samples_of(part, EXACT[number]) for part in parts)
                assert joined == samples_of(whole[number], EXACT[number])
                places += listener.places[1:]
                num_undecoded += listener.num_undecoded
    assert sum(place % 24_000 == 0 for place in places) < LOSSES // 10
    assert num_undecoded >= least_undecoded


async def test_after_losses_lossy_audio_has_no_gap_and_no_repeat_beyond_a_codec_frame(deploy: Deploy) -> None:
    chance = random.Random(2)
    async with deploy(Musical("vae")) as deployment:
        song = await make(deployment)
        for encoding, codec_frames in CODEC_FRAMES.items():
            audio_format = AudioFormat(encoding=encoding)
            header = await first_event(deployment, song, audio_format)
            async with Cutter(deployment.port, lambda: chance.randrange(5_000, 60_000)) as cutter:
                listener = Listener(deployment, cutter.port, song, OutputOptions(format=audio_format), chance)
                parts = await listener.listen(header.audio_header.frame_count)
            assert len(parts) > 1
            place = 0
            for part in parts:
                found = decode(part)
                # All that a part says it completes can be decoded, but for what the codec's last frame overlaps.
                assert part.frame_count - len(found) <= codec_frames
                for start in range(0, len(found) - 4800, 48_000):
                    assert abs(lag(found[start : start + 4800, 0], place + start)) <= 2
                place += part.frame_count


def lag(found: NDArray[np.floating], place: int) -> int:
    """Return by how many frames what was found at a place of the song lies elsewhere."""
    reach = 3000
    start = max(0, place - reach)
    around = SONG[start : place + len(found) + reach, 0]
    return int(np.argmax(np.correlate(around, found, mode="valid"))) - (place - start)


async def test_frames_asked_for_anywhere_are_those_of_the_whole(deploy: Deploy) -> None:
    chance = random.Random(3)
    async with deploy(Musical("vae")) as deployment:
        song = await make(deployment)
        for audio_format in EXACT[:3]:
            whole = await listen_whole(deployment, song, audio_format)
            size_bytes = len(whole.data) // whole.frame_count
            for _ in range(10):
                first = chance.randrange(whole.frame_count)
                count = chance.randrange(1, whole.frame_count - first + 1)
                request = StreamAudioRequest(
                    song=song, first_frame=first, frame_count=count, output=OutputOptions(format=audio_format)
                )
                call = SongServiceStub(deployment.channel).StreamAudio(request)
                data = b"".join([event.audio_chunk.data async for event in call])
                assert data == whole.data[first * size_bytes : (first + count) * size_bytes]


async def test_a_paced_stream_stays_so_far_ahead_of_playback(deploy: Deploy) -> None:
    """One second of a stream that may be half a second ahead takes half a second at least: a lower bound alone."""
    async with deploy(Musical("vae")) as deployment:
        song = await make(deployment)
        request = StreamAudioRequest(song=song, frame_count=48_000, output=OutputOptions(max_buffer_s=0.5))
        begun_s = time.monotonic()
        async for _ in SongServiceStub(deployment.channel).StreamAudio(request):
            pass
        assert time.monotonic() - begun_s >= 0.45
