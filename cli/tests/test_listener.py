"""Songs that outlive lost connections."""

import asyncio
import socket
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
import soundfile

from soundstage.music.v1.song_service_pb2 import (
    SONG_STATE_COMPLETED,
    GenerateSongRequest,
    GenerateSongResponse,
    StreamAudioRequest,
)
from soundstage.type.v1.audio_pb2 import (
    ENCODING_FLAC,
    ENCODING_PCM,
    ENCODING_WAV,
    AudioChunk,
    AudioHeader,
    Encoding,
)
from soundstage_cli.listener import Listener
from soundstage_cli.sinks import AudioFile, Sink
from soundstage_runtime.pcm import to_s16

from .conftest import CHUNK_FRAMES, NUM_FRAMES, Keeping, samples

AT_ONCE = [0.0] * 3
SONG = f"songs/{'a':0<32}"


class Memory:
    """Keeps what it is given, and forgets it when it starts over."""

    def __init__(self) -> None:
        self.data = b""
        self.num_headers = 0

    async def begin(self, header: AudioHeader) -> None:
        self.data = b""
        self.num_headers += 1

    async def write(self, chunk: AudioChunk) -> None:
        self.data += chunk.data


async def hear(
    gateway: str, keeping: Keeping, sink: Sink, encoding: Encoding.ValueType = ENCODING_PCM, first_frame: int = 0
) -> list[str]:
    """Play a song to a sink; what was said of lost connections."""
    keeping.keep("a")
    told: list[str] = []
    request = StreamAudioRequest(song=SONG, first_frame=first_frame)
    request.output.format.encoding = encoding
    async with grpc.aio.insecure_channel(gateway) as channel:
        await Listener(channel, tell=told.append, waits_s=AT_ONCE).play(request, sink, show=lambda _: None)
    return told


@pytest.mark.parametrize("encoding", [ENCODING_PCM, ENCODING_WAV])
@pytest.mark.parametrize("first_frame", [0, 1234])
async def test_samples_go_on_where_they_were_lost(
    gateway: str, keeping: Keeping, encoding: Encoding.ValueType, first_frame: int
) -> None:
    whole, joined = Memory(), Memory()
    await hear(gateway, keeping, whole, encoding, first_frame)
    for seed in range(20):
        num_cuts = 1 + seed % 4
        # At least a header and a chunk come, else the attempts would be too many; at times all but the trailer.
        keeping.cuts = np.random.default_rng(seed).integers(2, 11, num_cuts).tolist()
        told = await hear(gateway, keeping, joined, encoding, first_frame)
        assert joined.data == whole.data
        assert len(told) >= 1
    assert joined.num_headers == 20
    asked = keeping.streamed[-1]
    assert (asked.output.format.encoding, asked.first_frame > first_frame) == (ENCODING_PCM, True)


async def test_what_is_more_than_samples_starts_over(gateway: str, keeping: Keeping, tmp_path: Path) -> None:
    keeping.cuts = [0, 3, 1, 5]
    with AudioFile(tmp_path / "song.flac") as file:
        assert len(await hear(gateway, keeping, file, ENCODING_FLAC)) == 4
    found, _ = soundfile.read(tmp_path / "song.flac", dtype="int16")
    np.testing.assert_array_equal(found, to_s16(samples()))
    assert [request.first_frame for request in keeping.streamed] == [0] * 5


async def test_attempts_that_get_no_further_come_to_an_end(gateway: str, keeping: Keeping) -> None:
    sink = Memory()
    keeping.cuts = [3, 1, 1, 1, 1, 1, 1]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await hear(gateway, keeping, sink)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(keeping.streamed) == 1 + len(AT_ONCE)
    assert len(sink.data) == 2 * CHUNK_FRAMES * 4


@pytest.mark.parametrize("reason", ["CLOSING", "STAGE_UNAVAILABLE"])
async def test_what_is_not_there_for_a_while_is_asked_again(gateway: str, keeping: Keeping, reason: str) -> None:
    sink = Memory()
    keeping.cuts, keeping.reason = [0, 3, 0], reason
    assert await hear(gateway, keeping, sink) == ["Connection reset by peer; trying again in 0 s"] * 3
    assert sink.data == to_s16(samples()).tobytes()


async def test_a_song_that_has_failed_is_not_asked_again_though_it_was_for_want_of_a_stage(
    gateway: str, keeping: Keeping
) -> None:
    keeping.watch_cuts, keeping.reason = [2, 2], "SONG_FAILED"
    keeping.keep("a").variants.add()
    async with grpc.aio.insecure_channel(gateway) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="reset by peer"):
            await Listener(channel, tell=print, waits_s=AT_ONCE).perform(SONG, {}, show=lambda _: None)
    assert keeping.watch_cuts == [2]


async def test_a_song_whose_answer_is_lost_is_begun_once(gateway: str, keeping: Keeping) -> None:
    keeping.lost_answers = 2
    told: list[str] = []
    async with grpc.aio.insecure_channel(gateway) as channel:
        listener = Listener(channel, tell=told.append, waits_s=AT_ONCE)
        async with listener.making(GenerateSongRequest(caption="sea")) as first:
            pass
        async with listener.making(GenerateSongRequest(caption="sea")) as second:
            pass
    assert list(keeping.songs) == [first.name, second.name]
    assert told == ["the connection is lost; trying again in 0 s"] * 2


@pytest.mark.parametrize(
    ("is_made", "is_away", "wanted"), [(True, False, "was made already"), (False, True, "keeps it"), (False, False, "")]
)
async def test_a_song_that_outlives_its_cancelling_can_be_had_later(
    gateway: str, keeping: Keeping, is_made: bool, is_away: bool, wanted: str
) -> None:
    async def fail(listener: Listener) -> None:
        async with listener.making(GenerateSongRequest()) as song:
            if is_made:
                keeping.songs[song.name].state = SONG_STATE_COMPLETED
            keeping.is_away = is_away
            raise OSError("no space left")

    told: list[str] = []
    async with grpc.aio.insecure_channel(gateway) as channel:
        with pytest.raises(OSError, match="no space left"):
            await fail(Listener(channel, tell=told.append))
    assert len(told) == bool(wanted)
    assert all(wanted in line and f"`soundstage audio songs/{'1':0<32}`" in line for line in told)


async def test_a_gateway_that_is_not_there_is_said_to_be_so_at_once() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        told: list[str] = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{nobody.getsockname()[1]}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with Listener(channel, tell=told.append).making(GenerateSongRequest()):
                    pass
    assert (caught.value.code(), told) == (grpc.StatusCode.UNAVAILABLE, [])


async def test_an_error_that_is_no_loss_is_not_tried_again(gateway: str, keeping: Keeping) -> None:
    request = StreamAudioRequest(song="songs/none")
    async with grpc.aio.insecure_channel(gateway) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="not kept here"):
            await Listener(channel, tell=print, waits_s=AT_ONCE).play(request, Memory(), show=lambda _: None)
    assert len(keeping.streamed) == 1


async def test_every_variant_is_heard_once_though_the_events_are_lost_in_between(
    gateway: str, keeping: Keeping
) -> None:
    song = keeping.keep("a")
    for seed in range(3):
        song.variants.add(seed=seed)
    keeping.watch_cuts = [5, 9]
    sinks = [Memory() for _ in song.variants]
    parts = {number: (StreamAudioRequest(song=SONG, variant=number), sink) for number, sink in enumerate(sinks)}
    shown: list[GenerateSongResponse] = []
    async with grpc.aio.insecure_channel(gateway) as channel:
        await Listener(channel, tell=print, waits_s=AT_ONCE).perform(SONG, parts, show=shown.append)
    for number, sink in enumerate(sinks):
        assert sink.data == to_s16(samples(number)).tobytes()
    assert len(keeping.streamed) == 3
    heard = [event.audio_chunk.frame_count for event in shown if event.HasField("audio_chunk") and event.variant == 2]
    assert sum(heard) == NUM_FRAMES


async def test_the_first_error_of_a_variant_is_the_songs(gateway: str, keeping: Keeping) -> None:
    class Full(Memory):
        async def write(self, chunk: AudioChunk) -> None:
            raise OSError("no space left")

    keeping.keep("a").variants.add()
    parts = {0: (StreamAudioRequest(song=SONG), Full())}
    async with asyncio.timeout(10), grpc.aio.insecure_channel(gateway) as channel:
        with pytest.raises(OSError, match="no space left"):
            await Listener(channel, tell=print).perform(SONG, parts, show=lambda _: None)
