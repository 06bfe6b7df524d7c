"""A stream that is lost goes on from the very sample: the joined audio equals the unbroken one."""

import io
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import av
import numpy as np
from numpy.typing import NDArray

from soundstage.music.v1.song_service_pb2 import (
    GenerateSongRequest,
    OutputOptions,
    StreamAudioRequest,
    StreamAudioResponse,
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
NOISE = np.random.default_rng(5).normal(0, 0.1, (SECONDS * 48_000, 2))
TIME_S = np.arange(SECONDS * 48_000)[:, None] / 48_000
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


@dataclass
class Part:
    """What came before a connection was lost: bytes, and the frames that they complete."""

    data: bytes
    frame_count: int
    delay_frames: int


async def make(deployment: Deployment) -> str:
    request = GenerateSongRequest(caption="x", codes=[0] * (SECONDS * 5))
    call = SongServiceStub(deployment.channel).GenerateSong(request)
    events = [event async for event in call]
    return events[0].accepted.song


async def listen(deployment: Deployment, song: str, audio_format: AudioFormat, first_frame: int, lost: int) -> Part:
    """Listen from a frame on, and lose the connection after so many chunks."""
    output = OutputOptions(format=audio_format)
    request = StreamAudioRequest(song=song, first_frame=first_frame, output=output)
    call = SongServiceStub(deployment.channel).StreamAudio(request)
    part = Part(b"", 0, 0)
    async for event in call:
        if event.HasField("audio_header"):
            part.delay_frames = event.audio_header.encoder_delay_frames
        elif event.HasField("audio_chunk"):
            assert event.audio_chunk.first_frame == first_frame + part.frame_count
            part.data += event.audio_chunk.data
            part.frame_count += event.audio_chunk.frame_count
            lost -= 1
            if not lost:
                call.cancel()
                return part
    return part


async def listen_with_losses(
    deployment: Deployment, song: str, audio_format: AudioFormat, chance: random.Random
) -> list[Part]:
    total = (await first_event(deployment, song, audio_format)).audio_header.frame_count
    parts: list[Part] = []
    place = 0
    while place < total:
        parts.append(await listen(deployment, song, audio_format, place, chance.choice([1, 2, 3, 5, 8])))
        place += parts[-1].frame_count
    assert place == total
    return parts


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


def is_bare(audio_format: AudioFormat) -> bool:
    return audio_format.encoding == ENCODING_PCM


async def test_after_two_hundred_losses_pcm_wav_and_flac_are_what_they_would_have_been(deploy: Deploy) -> None:
    chance = random.Random(1)
    async with deploy(Musical("vae")) as deployment:
        song = await make(deployment)
        whole = [await listen(deployment, song, audio_format, 0, -1) for audio_format in EXACT]
        losses = 0
        while losses < 200:
            number = chance.randrange(len(EXACT))
            parts = await listen_with_losses(deployment, song, EXACT[number], chance)
            losses += len(parts) - 1
            if is_bare(EXACT[number]):
                assert b"".join(part.data for part in parts) == whole[number].data
            else:
                joined = np.concatenate([decode(part) for part in parts if part.frame_count])
                assert np.array_equal(joined, decode(whole[number]))


async def test_after_losses_lossy_audio_has_no_gap_and_no_repeat_beyond_a_codec_frame(deploy: Deploy) -> None:
    chance = random.Random(2)
    async with deploy(Musical("vae")) as deployment:
        song = await make(deployment)
        for encoding, codec_frames in CODEC_FRAMES.items():
            parts = await listen_with_losses(deployment, song, AudioFormat(encoding=encoding), chance)
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
            whole = await listen(deployment, song, audio_format, 0, -1)
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
