"""AlignLyrics over real gRPC, with a stage that knows its songs by their handles."""

import asyncio

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage.music.v1.song_service_pb2 import AlignLyricsRequest, CreateSongRequest, GenerateSongRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.stage.v1.dit_service_pb2 import AlignRequest, AlignResponse
from soundstage.type.v1.score_pb2 import LyricLine, SongMetadata
from soundstage_gateway.lyrics import write_lrc
from soundstage_runtime.call import SONG_KEY
from soundstage_runtime.errors import read_details

from .conftest import Context, Deploy, Deployment, Steady, Stuck


class Deaf(Steady):
    """A diffusion stage that begins to listen and never ends; songs it makes at once."""

    async def Align(self, request: AlignRequest, context: Context) -> AlignResponse:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()
        raise AssertionError("nothing sets the event")


class Forgetful(Steady):
    """A diffusion stage that has forgotten every song."""

    async def Align(self, request: AlignRequest, context: Context) -> AlignResponse:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no song is kept as 'x'")
        raise AssertionError("abort raises")


async def make(deployment: Deployment, *seeds: int) -> str:
    """Make a song with a variant for every seed; returns its name."""
    request = GenerateSongRequest(caption="a", metadata=SongMetadata(duration_s=1), variants=len(seeds), seeds=seeds)
    events = [event async for event in SongServiceStub(deployment.channel).GenerateSong(request)]
    return events[0].accepted.song


async def test_a_finished_variant_is_aligned_under_its_own_handle(deploy: Deploy) -> None:
    async with deploy() as deployment:
        stub, song = SongServiceStub(deployment.channel), await make(deployment, 7, 8)
        first, second = [await stub.AlignLyrics(AlignLyricsRequest(song=song, variant=number)) for number in (0, 1)]
        assert deployment.stages["dit"].metadata[-1][SONG_KEY] == song
    assert [line.text for line in first.lines] == ["[verse]", "song-of-seed-7"]
    assert (second.lines[1].start_s, second.lines[1].end_s, second.score) == (83.456, 84, 0.5)
    assert second.lrc == "[00:00.00][verse]\n[01:23.46]song-of-seed-8\n"


@pytest.mark.parametrize("song", ["songs/none", ""])
async def test_a_song_that_is_not_known_is_refused(deploy: Deploy, song: str) -> None:
    async with deploy() as deployment:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await SongServiceStub(deployment.channel).AlignLyrics(AlignLyricsRequest(song=song))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert read_details(caught.value).reason == "SONG_UNKNOWN"
    assert f"song is '{song}'" in (caught.value.details() or "")


async def test_a_variant_that_a_song_has_not_is_refused_by_its_field(deploy: Deploy) -> None:
    async with deploy() as deployment:
        song = await make(deployment, 7)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await SongServiceStub(deployment.channel).AlignLyrics(AlignLyricsRequest(song=song, variant=1))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = read_details(caught.value).violations
    assert (violation.field, violation.description) == ("variant", f"is 1; {song} has variants 0 to 0")


async def test_a_variant_that_is_not_made_yet_is_said_to_be(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment:
        stub = SongServiceStub(deployment.channel)
        song = (await stub.CreateSong(CreateSongRequest(request=GenerateSongRequest(caption="a")))).song.name
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.AlignLyrics(AlignLyricsRequest(song=song))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert read_details(caught.value).reason == "VARIANT_UNFINISHED"


async def test_a_song_that_the_stage_has_forgotten_is_said_to_be(deploy: Deploy) -> None:
    async with deploy(Forgetful("dit")) as deployment:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await SongServiceStub(deployment.channel).AlignLyrics(AlignLyricsRequest(song=await make(deployment, 7)))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "dit stage: no song is kept" in (caught.value.details() or "")


async def test_cancelling_cancels_the_stage(deploy: Deploy) -> None:
    deaf = Deaf("dit")
    async with deploy(deaf) as deployment:
        song = await make(deployment, 7)
        call = SongServiceStub(deployment.channel).AlignLyrics(AlignLyricsRequest(song=song))
        await asyncio.wait_for(deaf.begun.wait(), timeout=5)
        call.cancel()
        await asyncio.wait_for(deaf.cancelled.wait(), timeout=5)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0, "00:00.00"), (83.456, "01:23.46"), (59.994, "00:59.99"), (59.999, "01:00.00"), (600, "10:00.00")],
)
def test_times_are_minutes_seconds_and_hundredths(seconds: float, written: str) -> None:
    assert write_lrc([LyricLine(text="la", start_s=seconds)]) == f"[{written}]la\n"


@given(st.floats(0, 600))
def test_a_time_can_be_read_back(seconds: float) -> None:
    written = write_lrc([LyricLine(start_s=seconds)])
    minutes, rest = written.strip("[]\n").split(":")
    assert len(rest) == 5
    assert float(rest) < 60
    assert int(minutes) * 60 + float(rest) == pytest.approx(seconds, abs=0.0051)
