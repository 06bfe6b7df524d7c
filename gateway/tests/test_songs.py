"""Songs outlive their calls: created, watched, listed, played in any range, cancelled, deleted, begun again."""

import asyncio
import hashlib
import io
import math
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
import numpy as np
import pytest
import soundfile

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage.music.v1.song_service_pb2 import (
    SONG_STATE_CANCELLED,
    SONG_STATE_COMPLETED,
    SONG_STATE_FAILED,
    SONG_STATE_RUNNING,
    CancelSongRequest,
    CreateSongRequest,
    DeleteSongRequest,
    GenerateSongRequest,
    GenerateSongResponse,
    GetSongRequest,
    ListSongsRequest,
    Song,
    StreamAudioRequest,
    StreamAudioResponse,
    WatchSongRequest,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.stage.v1.vae_service_pb2 import DecodeResponse
from soundstage.type.v1.audio_pb2 import ENCODING_FLAC, SAMPLE_FORMAT_F32
from soundstage_gateway.store import KeptSong, Store
from soundstage_runtime.errors import read_details

if TYPE_CHECKING:
    from soundstage.music.v1.song_service_pb2_grpc import SongServiceAsyncStub

from .conftest import Broken, Context, Deploy, Deployment, Steady, Stuck
from .files import sound_file

FRAMES = 4 * 48_000
S = TypeVar("S", bound=Store)
F32 = {"format": {"sample_format": SAMPLE_FORMAT_F32}}


def request(**changes: Any) -> GenerateSongRequest:
    fields: dict[str, Any] = {"caption": "a calm piano", "metadata": {"duration_s": 4}, "seeds": [7]}
    return GenerateSongRequest(**fields | changes)


def stub(deployment: Deployment) -> "SongServiceAsyncStub":
    return SongServiceStub(deployment.channel)


async def create(deployment: Deployment, request_id: str = "", **changes: Any) -> Song:
    wanted = CreateSongRequest(request=request(**changes), request_id=request_id)
    return (await stub(deployment).CreateSong(wanted)).song


async def watch(deployment: Deployment, song: str, after: int | None = None) -> list[GenerateSongResponse]:
    call = stub(deployment).WatchSong(WatchSongRequest(song=song, after_sequence=after))
    return [response.event async for response in call]


async def watch_patiently(deployment: Deployment, song: str) -> None:
    """Watch a song, again and again while it waits to be begun."""
    while True:
        try:
            await watch(deployment, song)
            break
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            await asyncio.sleep(0.1)


async def get(deployment: Deployment, song: str) -> Song:
    return (await stub(deployment).GetSong(GetSongRequest(song=song))).song


async def stream(deployment: Deployment, song: str, **fields: Any) -> list[StreamAudioResponse]:
    return [event async for event in stub(deployment).StreamAudio(StreamAudioRequest(song=song, **fields))]


def pcm(events: list[StreamAudioResponse]) -> bytes:
    return b"".join(event.audio_chunk.data for event in events if event.HasField("audio_chunk"))


async def made(deployment: Deployment, **changes: Any) -> str:
    """Make a song, and return its name."""
    song = (await create(deployment, **changes)).name
    await watch(deployment, song)
    return song


def store(deployment: Deployment, kind: type[S]) -> S:
    assert isinstance(deployment.store, kind)
    return deployment.store


async def refusal(awaitable: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


async def test_a_created_song_is_made_without_anybody_waiting_and_can_be_played(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await create(deployment, variants=2)
        assert (song.state, song.variants[0].seed) == (SONG_STATE_RUNNING, 7)
        assert song.expire_time.seconds - song.create_time.seconds == 3600
        events = await watch(deployment, song.name)
        done = await get(deployment, song.name)
        audio = await stream(deployment, song.name, variant=1, output=F32)
    assert [event.WhichOneof("event") for event in events].count("completed") == 2
    assert events[-1].completed.frame_count == FRAMES
    assert not events[-1].completed.pcm_sha256
    assert (done.state, done.request.caption) == (SONG_STATE_COMPLETED, "a calm piano")
    assert [(variant.frame_count, variant.plan.metadata.bpm) for variant in done.variants] == [(FRAMES, 120)] * 2
    assert list(done.request.seeds) == [variant.seed for variant in done.variants]
    header, trailer = audio[0].audio_header, audio[-1].audio_trailer
    assert (header.frame_count, header.first_frame, header.media_type[:11]) == (FRAMES, 0, "audio/x-F32")
    steps = (np.arange(100, dtype=np.float32) + done.variants[1].seed % 1000) / np.float32(32_767)
    assert np.array_equal(np.frombuffer(pcm(audio), "<f4")[:: 2 * 1920], steps)
    assert trailer.pcm_sha256 == hashlib.sha256(pcm(audio)).digest()
    assert (trailer.frame_count, trailer.peak) == (FRAMES, steps[-1])


async def test_a_request_id_makes_one_song_however_often_it_is_sent(deploy: Deploy) -> None:
    async with deploy() as deployment:
        found = await asyncio.gather(*(create(deployment, request_id="mine") for _ in range(5)))
        await watch(deployment, found[0].name)
        again = await create(deployment, request_id="mine", caption="other")
        other = await create(deployment, request_id="another")
        refused = await refusal(create(deployment, request_id="ä"))
    assert {song.name for song in found} == {again.name}
    assert again.state == SONG_STATE_COMPLETED
    assert other.name != again.name
    assert "request_id is 'ä'; must be" in str(refused.details())


async def test_a_watcher_goes_on_after_the_last_event_it_has(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await made(deployment)
        every = await watch(deployment, song)
        rest = await watch(deployment, song, after=every[3].sequence)
    assert [event.sequence for event in every] == list(range(len(every)))
    assert rest == every[4:]


async def test_songs_are_listed_newest_first_in_pages(deploy: Deploy) -> None:
    async with deploy() as deployment:
        names = [await made(deployment) for _ in range(5)]
        found: list[str] = []
        token = ""
        while True:
            page = await stub(deployment).ListSongs(ListSongsRequest(page_size=2, page_token=token))
            found += [song.name for song in page.songs]
            token = page.next_page_token
            if not token:
                break
        refused = await refusal(stub(deployment).ListSongs(ListSongsRequest(page_token="x", page_size=1000)))
    assert found == names[::-1]
    assert {violation.field for violation in read_details(refused).violations} == {"page_token", "page_size"}


async def test_cancelling_a_song_stops_its_stage_and_ends_its_watchers(deploy: Deploy) -> None:
    stuck = Stuck("dit")
    async with deploy(stuck) as deployment:
        song = await create(deployment)
        watcher = asyncio.create_task(watch(deployment, song.name))
        player = asyncio.create_task(stream(deployment, song.name))
        await asyncio.wait_for(stuck.begun.wait(), 5)
        left = (await stub(deployment).CancelSong(CancelSongRequest(song=song.name))).song
        await asyncio.wait_for(stuck.cancelled.wait(), 5)
        for task in (watcher, player):
            error = await refusal(task)
            assert error.code() is grpc.StatusCode.CANCELLED
        late = await refusal(watch(deployment, song.name))
    assert left.state == SONG_STATE_CANCELLED
    assert read_details(late).reason == "SONG_CANCELLED"


async def test_a_failed_song_tells_why_now_and_later(deploy: Deploy) -> None:
    async with deploy(Broken("dit")) as deployment:
        song = await create(deployment)
        first = await refusal(watch(deployment, song.name))
        later = await refusal(watch(deployment, song.name))
        audio = await refusal(stream(deployment, song.name))
        left = await get(deployment, song.name)
    assert {error.code() for error in (first, later, audio)} == {grpc.StatusCode.INTERNAL}
    assert (left.state, left.error.code, left.error.reason) == (SONG_STATE_FAILED, 13, "STAGE_FAILED")
    assert "the dit stage" in left.error.message
    assert "secret" not in left.error.message


class Loud(Steady):
    """A codec that decodes beyond full scale."""

    async def Decode(self, request_iterator: Any, context: Context) -> AsyncIterator[DecodeResponse]:
        async for response in super().Decode(request_iterator, context):
            words = np.frombuffer(response.audio.data, "<f4") * np.float32(1000)
            response.audio.data = words.tobytes()
            yield response


class Halting(Steady):
    """A diffusion stage that makes its first song, and halts in the next until it is told to break."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.num_begun = 0
        self.has_to_break = asyncio.Event()

    async def between(self) -> None:
        self.num_begun += 1
        if self.num_begun > 1:
            self.begun.set()
            await self.has_to_break.wait()
            raise RuntimeError("the second song")


class Full(Store):
    """A store whose disk is full once a song is begun."""

    async def update(self, kept: KeptSong) -> None:
        raise OSError("no space left on device")


class Slow(Store):
    """A store that takes its time over the first song it writes down, and says when it begins."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun, self.go_on, self.removed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def add(self, kept: KeptSong) -> None:
        await super().add(kept)
        if not self.begun.is_set():
            self.begun.set()
            await self.go_on.wait()

    async def remove(self, name: str) -> None:
        await super().remove(name)
        self.removed.set()


async def test_a_song_that_cannot_be_written_down_ends_and_is_made_again_by_the_next_process(deploy: Deploy) -> None:
    async with deploy(make_store=Full) as deployment:
        song = (await create(deployment)).name
        events = await watch(deployment, song)
        assert (await get(deployment, song)).state == SONG_STATE_COMPLETED
        assert len(pcm(await stream(deployment, song))) == 4 * FRAMES
    async with deploy() as deployment:
        again = await watch(deployment, song)
        assert (await get(deployment, song)).state == SONG_STATE_COMPLETED
    assert events[-1].completed.seed == again[-1].completed.seed
    async with deploy(make_store=Full) as deployment:
        await stub(deployment).DeleteSong(DeleteSongRequest(song=song))
        error = await refusal(get(deployment, song))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_created_song_outlives_its_call_from_when_it_is_written_down(deploy: Deploy) -> None:
    async with deploy(make_store=Slow) as deployment:
        call = stub(deployment).CreateSong(CreateSongRequest(request=request(), request_id="mine"))
        await store(deployment, Slow).begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        again = await create(deployment, request_id="mine")
        await watch_patiently(deployment, again.name)
        listed = (await stub(deployment).ListSongs(ListSongsRequest())).songs
    assert [(song.name, song.state) for song in listed] == [(again.name, SONG_STATE_COMPLETED)]


async def test_another_song_is_not_there_when_its_call_ends_as_it_is_written_down(deploy: Deploy) -> None:
    async with deploy(make_store=Slow, max_songs=1) as deployment:
        call = stub(deployment).GenerateSong(request())
        await store(deployment, Slow).begun.wait()
        call.cancel()
        async with asyncio.timeout(5):
            await store(deployment, Slow).removed.wait()
        song = await made(deployment)
        listed = (await stub(deployment).ListSongs(ListSongsRequest())).songs
    assert [song.name for song in listed] == [song]


async def test_a_song_that_is_only_written_down_waits_and_holds_up_no_other(deploy: Deploy) -> None:
    async with deploy(make_store=Slow) as deployment:
        slow = asyncio.create_task(create(deployment))
        await store(deployment, Slow).begun.wait()
        await made(deployment)
        waiting = (await stub(deployment).ListSongs(ListSongsRequest())).songs[1].name
        errors = [await refusal(watch(deployment, waiting)), await refusal(stream(deployment, waiting))]
        store(deployment, Slow).go_on.set()
        assert (await slow).name == waiting
        audio = pcm(await stream(deployment, waiting))
    assert [error.code() for error in errors] == [grpc.StatusCode.UNAVAILABLE] * 2
    assert [read_details(error).reason for error in errors] == ["SONG_WAITS"] * 2
    assert len(audio) == 4 * FRAMES


async def test_a_song_is_begun_again_as_soon_as_the_stages_are_there(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment:
        song = (await create(deployment)).name
        await asyncio.wait_for(deployment.stages["dit"].begun.wait(), 5)
    async with deploy(late="vae") as deployment:
        assert (await get(deployment, song)).state == SONG_STATE_RUNNING
        error = await refusal(watch(deployment, song))
        await deployment.servers["vae"].start()
        async with asyncio.timeout(20):
            await watch_patiently(deployment, song)
        assert (await get(deployment, song)).state == SONG_STATE_COMPLETED
        assert len(pcm(await stream(deployment, song))) == 4 * FRAMES
    assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_song_that_waits_to_be_begun_again_can_be_cancelled_or_deleted_or_expires(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment:
        cancelled, deleted, other = [(await create(deployment)).name for _ in range(3)]
    async with deploy(Stuck("dit"), keep_s=0.001) as deployment:
        expired = (await create(deployment)).name
    async with deploy(late="vae") as deployment:
        left = (await stub(deployment).CancelSong(CancelSongRequest(song=cancelled))).song
        await stub(deployment).DeleteSong(DeleteSongRequest(song=deleted))
        await deployment.studio.sweep()
        heard = [await refusal(watch(deployment, song)) for song in (cancelled, deleted, expired)]
        await deployment.servers["vae"].start()
        async with asyncio.timeout(20):
            await watch_patiently(deployment, other)
        listed = (await stub(deployment).ListSongs(ListSongsRequest())).songs
        assert len(deployment.stages["dit"].requests) == 1
    assert left.state == SONG_STATE_CANCELLED
    assert [read_details(error).reason for error in heard] == ["SONG_CANCELLED", "SONG_UNKNOWN", "SONG_UNKNOWN"]
    states = {song.name: song.state for song in listed}
    assert states == {cancelled: SONG_STATE_CANCELLED, other: SONG_STATE_COMPLETED}


async def test_a_song_that_is_only_written_down_can_be_cancelled(deploy: Deploy) -> None:
    async with deploy(make_store=Slow) as deployment:
        slow = asyncio.create_task(create(deployment))
        await store(deployment, Slow).begun.wait()
        [waiting] = (await stub(deployment).ListSongs(ListSongsRequest())).songs
        left = (await stub(deployment).CancelSong(CancelSongRequest(song=waiting.name))).song
        store(deployment, Slow).go_on.set()
        error = await refusal(slow)
        again = await get(deployment, waiting.name)
        assert deployment.stages["lm"].requests == []
    assert left.state == again.state == SONG_STATE_CANCELLED
    assert read_details(error).reason == "SONG_CANCELLED"


async def test_a_song_that_cannot_be_begun_again_is_failed_and_stops_no_other(deploy: Deploy, tmp_path: Path) -> None:
    async with deploy() as deployment:
        source = await made(deployment)
    async with deploy(Stuck("dit")) as deployment:
        task = {"repaint": {"start_s": 1, "end_s": 2}}
        lost = (await create(deployment, task=task, source=source, metadata=None, planner={"enabled": False})).name
        other = (await create(deployment)).name
    for song in (source, lost):
        shutil.rmtree(tmp_path / "songs" / song)
    async with deploy() as deployment:
        await watch(deployment, other)
        assert (await get(deployment, lost)).state == SONG_STATE_FAILED
        assert (await get(deployment, other)).state == SONG_STATE_COMPLETED
        error = await refusal(stream(deployment, source))
        assert "disk" not in (await get(deployment, lost)).error.message
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_everybody_hears_the_own_song_where_there_is_room_for_no_tape(deploy: Deploy) -> None:
    async with deploy(tape_limit_bytes=1) as deployment:
        songs = [await made(deployment, seeds=[seed]) for seed in range(6)]
        alone = [pcm(await stream(deployment, song)) for song in songs]
        outputs = [{"peak_dbfs": 20 * math.log10((seed + 99) / 32_767)} for seed in range(6)]  # the peak it has
        for output in ({}, None):
            heard = await asyncio.gather(
                *(
                    stream(deployment, songs[number % 6], output=outputs[number % 6] if output is None else output)
                    for number in range(36)
                )
            )
            assert [pcm(events) for events in heard] == [alone[number % 6] for number in range(36)]
    assert len(set(alone)) == 6


async def test_a_refused_listener_takes_no_songs_place(deploy: Deploy) -> None:
    async with deploy(Stuck("vae"), max_listeners=1, max_songs=1) as deployment:
        song = await made(deployment)
        listener = stub(deployment).StreamAudio(StreamAudioRequest(song=song))
        await listener.read()
        for detach in (False, True):
            call = stub(deployment).GenerateSong(request(detach=detach))
            error = await refusal(call.read())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        again = await made(deployment)
        listed = (await stub(deployment).ListSongs(ListSongsRequest())).songs
        listener.cancel()
    assert [song.name for song in listed] == [again, song]


async def test_watchers_are_bounded(deploy: Deploy) -> None:
    async with deploy(Stuck("dit"), max_watchers=1) as deployment:
        song = (await create(deployment)).name
        first = stub(deployment).WatchSong(WatchSongRequest(song=song))
        await first.read()
        error = await refusal(watch(deployment, song))
        first.cancel()
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_the_source_of_a_song_in_the_making_counts_against_the_size_cap(deploy: Deploy) -> None:
    async with deploy() as deployment:
        source = await made(deployment)
    async with deploy(Stuck("dit"), store_limit_bytes=1 << 20) as deployment:
        running = (await create(deployment, task={"cover": {}}, source=source, metadata=None)).name  # 1.5 MB
        await deployment.studio.sweep()
        listed = (await stub(deployment).ListSongs(ListSongsRequest())).songs
    assert [song.name for song in listed] == [running]


async def test_a_songs_samples_are_heard_as_those_of_a_file_of_it_are(deploy: Deploy) -> None:
    """The codec may go beyond full scale, a listener may keep that in 32 bits, and a file of it is clipped."""
    async with deploy(Loud("vae")) as deployment:
        song = await made(deployment)
        samples = np.frombuffer(pcm(await stream(deployment, song, output=F32)), "<f4").reshape(-1, 2)
        file = sound_file(samples, 48_000, "WAV", "FLOAT")
        parts = (UploadAudioRequest(data=file[first : first + 500_000]) for first in range(0, len(file), 500_000))
        asset = (await AudioServiceStub(deployment.channel).UploadAudio(parts)).asset
        for source in (song, asset):
            await made(deployment, task={"cover": {}}, source=source, references=[source], metadata=None)
        by_song, references_by_song, by_asset, references_by_asset = deployment.stages["vae"].audio
    assert np.abs(samples).max() > 1
    assert np.array_equal(by_song, by_asset)
    assert np.array_equal(references_by_song, references_by_asset)


async def test_nothing_is_decoded_for_a_request_that_is_refused(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await made(deployment)
        deployment.stages["vae"].requests.clear()
        names = [f"{song}/variants/{'0' * number}" for number in range(1, 100)]
        error = await refusal(create(deployment, references=names))
        assert "references has 99 entries; at most" in str(error.details())
        task = {"repaint": {"start_s": 11}}
        error = await refusal(create(deployment, task=task, source=song, references=[song], metadata=None))
        assert "task.repaint.start_s is 11" in str(error.details())
        assert deployment.stages["vae"].requests == []


async def test_a_cancelled_repaint_leaves_nothing_of_its_source(deploy: Deploy, tmp_path: Path) -> None:
    async with deploy() as deployment:
        source = await made(deployment)
    async with deploy(Stuck("dit")) as deployment:
        task = {"repaint": {"start_s": 1, "end_s": 2}}
        song = (await create(deployment, task=task, source=source, metadata=None, planner={"enabled": False})).name
        await asyncio.wait_for(deployment.stages["dit"].begun.wait(), 5)
        assert {file.name for file in (tmp_path / "songs" / song).iterdir()} >= {"source.npy"}
        await stub(deployment).CancelSong(CancelSongRequest(song=song))
        assert list((tmp_path / "songs" / song).iterdir()) == []


@pytest.mark.parametrize("end", ["cancelled", "failed", "left"])
async def test_what_is_made_of_an_unfinished_repaint_keeps_its_sources_samples(deploy: Deploy, end: str) -> None:
    async with deploy() as deployment:
        source = await made(deployment, seeds=[3])
    halting = Halting("dit")
    async with deploy(halting, tape_limit_bytes=1) as deployment:
        task = {"repaint": {"start_s": 1, "end_s": 2}}
        wanted = request(task=task, source=source, metadata=None, variants=2, seeds=[7, 8])
        call = stub(deployment).GenerateSong(wanted)
        events = aiter(call)
        song = (await anext(events)).accepted.song
        made_first = -1
        while made_first < 0:
            event = await anext(events)
            made_first = event.variant if event.HasField("audio_header") else -1
        whole = pcm(await stream(deployment, song, variant=made_first))
        await asyncio.wait_for(halting.begun.wait(), 5)
        if end == "cancelled":
            await stub(deployment).CancelSong(CancelSongRequest(song=song))
        elif end == "left":
            call.cancel()
        else:
            halting.has_to_break.set()
        await refusal(watch(deployment, song))
        again = pcm(await stream(deployment, song, variant=made_first))
    assert np.frombuffer(whole, "<i2")[0] == 3  # the source's own first sample
    assert again == whole


async def test_a_deleted_song_is_gone(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await made(deployment)
        await stream(deployment, song)
        await stub(deployment).DeleteSong(DeleteSongRequest(song=song))
        calls = [
            get(deployment, song),
            stream(deployment, song),
            watch(deployment, song),
            stub(deployment).DeleteSong(DeleteSongRequest(song=song)),
        ]
        errors = [await refusal(call) for call in calls]
        assert (await stub(deployment).ListSongs(ListSongsRequest())).songs == []
    assert {error.code() for error in errors} == {grpc.StatusCode.NOT_FOUND}
    assert {read_details(error).reason for error in errors} == {"SONG_UNKNOWN"}


async def test_songs_expire(deploy: Deploy) -> None:
    async with deploy(keep_s=0.001) as deployment:
        song = await made(deployment)
        await deployment.studio.sweep()
        error = await refusal(stream(deployment, song))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_the_oldest_songs_go_when_there_is_no_room(deploy: Deploy) -> None:
    async with deploy(store_limit_bytes=60_000) as deployment:  # latents of 4 s take 25.6 kB
        names = [await made(deployment) for _ in range(4)]
        await deployment.studio.sweep()
        kept = (await stub(deployment).ListSongs(ListSongsRequest())).songs
    assert [song.name for song in kept] == names[:1:-1]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"first_frame": FRAMES + 1}, "first_frame", f"is {FRAMES + 1}; the song ends after {FRAMES} frames"),
        ({"first_frame": FRAMES, "frame_count": 1}, "frame_count", "is 1; must be at most 0, the song's end"),
        ({"first_frame": 2**64 - 1, "frame_count": 1}, "first_frame", f"is {2**64 - 1}; the song ends after"),
        ({"first_frame": 5, "frame_count": FRAMES}, "frame_count", f"is {FRAMES}; must be at most {FRAMES - 5}"),
        ({"first_frame": 1, "frame_count": 2**64 - 1}, "frame_count", f"is {2**64 - 1}; must be at most {FRAMES - 1}"),
        ({"variant": 1}, "variant", "is 1; "),
        ({"output": {"gain_db": 99}}, "output.gain_db", "is 99; must be -60 to 20"),
    ],
)
async def test_a_bad_range_is_refused_by_its_name(
    deploy: Deploy, fields: dict[str, Any], field: str, words: str
) -> None:
    async with deploy() as deployment:
        error = await refusal(stream(deployment, await made(deployment), **fields))
    [violation] = read_details(error).violations
    assert violation.field == field
    assert words in violation.description


async def test_a_range_in_flac_says_its_own_length(deploy: Deploy) -> None:
    output = {"format": {"encoding": ENCODING_FLAC, "sample_rate_hz": 24_000}}
    async with deploy() as deployment:
        events = await stream(deployment, await made(deployment), first_frame=7, frame_count=50_001, output=output)
    assert soundfile.info(io.BytesIO(pcm(events))).frames == events[0].audio_header.frame_count == 50_001


@pytest.mark.parametrize("rate_hz", [48_000, 44_100])
async def test_at_its_end_a_song_has_nothing_left_to_play(deploy: Deploy, rate_hz: int) -> None:
    """A client that lost its connection after the last frame need not know that it was the last."""
    async with deploy() as deployment:
        song = await made(deployment)
        output = {"format": {"sample_rate_hz": rate_hz}}
        header, trailer = await stream(deployment, song, first_frame=4 * rate_hz, output=output)
    assert (header.audio_header.first_frame, header.audio_header.frame_count) == (4 * rate_hz, 0)
    assert (trailer.audio_trailer.frame_count, trailer.audio_trailer.pcm_sha256) == (0, hashlib.sha256().digest())


async def test_a_song_streams_while_it_is_still_being_decoded(deploy: Deploy) -> None:
    stuck = Stuck("vae")
    async with deploy(stuck) as deployment:
        song = await made(deployment)
        call = stub(deployment).StreamAudio(StreamAudioRequest(song=song))
        events = [await anext(aiter(call)) for _ in range(2)]
        call.cancel()
        await asyncio.wait_for(stuck.cancelled.wait(), 5)  # nobody listens, so nothing is decoded
    assert events[0].HasField("audio_header")
    assert events[1].audio_chunk.frame_count == 24_000


async def test_a_detached_song_is_finished_though_its_call_is_cancelled(deploy: Deploy) -> None:
    async with deploy() as deployment:
        call = stub(deployment).GenerateSong(request(detach=True))
        accepted = await anext(aiter(call))
        call.cancel()
        await watch(deployment, accepted.accepted.song)
        assert (await get(deployment, accepted.accepted.song)).state == SONG_STATE_COMPLETED


async def test_a_detached_song_outlives_the_deadline_of_its_call(deploy: Deploy) -> None:
    slow = Stuck("dit")
    async with deploy(slow) as deployment:
        call = stub(deployment).GenerateSong(request(detach=True), timeout=0.5)
        accepted = await anext(aiter(call))
        await refusal(_drain(call))
        assert slow.remaining_s == [None]
        assert (await get(deployment, accepted.accepted.song)).state == SONG_STATE_RUNNING


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


async def test_a_song_that_ends_with_its_call_is_kept_as_cancelled(deploy: Deploy) -> None:
    stuck = Stuck("dit")
    async with deploy(stuck) as deployment:
        call = stub(deployment).GenerateSong(request())
        accepted = await anext(aiter(call))
        await asyncio.wait_for(stuck.begun.wait(), 5)
        call.cancel()
        await refusal(watch(deployment, accepted.accepted.song))
        assert (await get(deployment, accepted.accepted.song)).state == SONG_STATE_CANCELLED


async def test_a_new_process_begins_again_what_the_last_one_was_making(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as first:
        running = await create(first, request_id="mine", seeds=[11])
    async with deploy() as second:
        assert (await create(second, request_id="mine")).name == running.name
        await watch(second, running.name)
        song = await get(second, running.name)
        audio = await stream(second, running.name, output=F32)
    assert (song.state, song.variants[0].seed) == (SONG_STATE_COMPLETED, 11)
    assert np.frombuffer(pcm(audio), "<f4")[0] == np.float32(11) / np.float32(32_767)


async def test_finished_songs_are_there_in_the_next_process(deploy: Deploy) -> None:
    async with deploy() as first:
        song = await made(first)
        audio, events = await stream(first, song), await watch(first, song)
    async with deploy() as second:
        assert pcm(await stream(second, song)) == pcm(audio)
        assert await watch(second, song) == events


async def test_a_finished_song_can_be_the_source_of_another(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await made(deployment, variants=2, seeds=[7, 8])
        await made(deployment, task={"cover": {}}, source=f"{song}/variants/1", metadata={})
        heard = deployment.stages["vae"].audio[0]
    assert heard[0, 0] == np.float32(8) / np.float32(32_767)
    assert len(heard) == FRAMES


async def test_a_song_that_cannot_be_a_source_is_refused_by_the_field_that_names_it(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await made(deployment)
        for name in ("songs/none", f"{song}/variants/1", f"{song}/variants/x"):
            error = await refusal(create(deployment, task={"cover": {}}, source=name, metadata={}))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            [violation] = read_details(error).violations
            assert violation.field == "source"
            assert f"is {name!r}, which is not kept here" in violation.description


async def test_a_song_without_audio_is_no_source_though_it_is_kept(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment:
        song = (await create(deployment)).name
        await stub(deployment).CancelSong(CancelSongRequest(song=song))
        error = await refusal(create(deployment, task={"cover": {}}, source=song, references=[song], metadata={}))
    told = [(violation.field, violation.description) for violation in read_details(error).violations]
    why = f"is {song!r}, which has no audio: name a song that is completed"
    assert told == [("source", why), ("references[0]", why)]


async def test_the_peak_can_be_moved_where_the_whole_song_is_known(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await made(deployment)
        audio = await stream(deployment, song, output={"peak_dbfs": -6.0} | F32)
        refused = await refusal(create(deployment, output={"peak_dbfs": -6.0}))
    assert audio[-1].audio_trailer.peak == pytest.approx(10 ** (-6 / 20), rel=1e-6)
    assert "output.peak_dbfs" in str(refused.details())


async def test_a_model_is_chosen_by_its_name_or_its_variant(deploy: Deploy) -> None:
    async with deploy(Steady("dit", variant="xl-turbo")) as deployment:
        await made(deployment, model="models/dit/dit-model")
        await made(deployment, model="xl-turbo")
        refused = await refusal(create(deployment, model="base"))
    assert "model is 'base'; must be one of models/dit/dit-model (xl-turbo)" in str(refused.details())


async def test_what_the_models_variant_cannot_do_is_refused_before_a_song_is_begun(deploy: Deploy) -> None:
    diffusion = {"steps": 50, "guidance": {"scale": 3.0}, "sampler": "SAMPLER_HEUN"}
    async with deploy(Steady("dit", variant="xl-turbo")) as deployment:
        source = await made(deployment)
        told = await refusal(create(deployment, diffusion=diffusion))
        edited = await refusal(create(deployment, diffusion=diffusion, task={"edit": {}}, source=source, metadata={}))
        extracted = await refusal(create(deployment, task={"extract": {}}, source=source, metadata={}))
        songs = await stub(deployment).ListSongs(ListSongsRequest())
    fields = [[violation.field for violation in read_details(error).violations] for error in (told, edited, extracted)]
    options = ["diffusion.steps", "diffusion.guidance.scale"]
    assert fields == [options, [*options, "diffusion.sampler"], ["task.extract"]]
    assert [song.name for song in songs.songs] == [source]


async def test_listeners_are_bounded(deploy: Deploy) -> None:
    async with deploy(Stuck("vae"), max_listeners=1) as deployment:
        song = await made(deployment)
        call = stub(deployment).StreamAudio(StreamAudioRequest(song=song))
        await anext(aiter(call))
        error = await refusal(stream(deployment, song))
        call.cancel()
    assert (error.code(), read_details(error).reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
