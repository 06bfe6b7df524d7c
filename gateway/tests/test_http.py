"""The HTTP port as clients and players see it."""

import asyncio
import io
import json
import re
from itertools import pairwise
from pathlib import Path

import av
import httpx2
import numpy as np
import pytest
import soundfile
from google.protobuf.json_format import ParseDict
from numpy.typing import NDArray

from soundstage.music.v1.song_service_pb2 import GetSongRequest, GetSongResponse, StreamAudioRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_runtime.validation import MAX_CAPTION_CHARS

from .conftest import Broken, Deploy, Stuck
from .files import sound_file, words
from .web import JSON, REQUEST, Gradual, Held, client, create, finish, leave, num_frames, until

FRAMES = 4 * 48_000


def events(text: str) -> list[dict[str, str]]:
    """The events of a stream, comments left out."""
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]


async def test_a_song_is_made_and_told_as_grpc_tells_it(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        answer = await http.post("/v1/songs", json=REQUEST)
        song = answer.json()["song"]
        assert answer.status_code == 201
        assert answer.headers["location"] == f"/v1/{song['name']}"
        await http.get(f"/v1/{song['name']}/audio.wav")
        told = (await http.get(f"/v1/{song['name']}")).json()
        kept = await SongServiceStub(deployment.channel).GetSong(GetSongRequest(song=song["name"]))
    assert told["song"]["state"] == "SONG_STATE_COMPLETED"
    assert told["song"]["variants"][0]["frameCount"] == str(FRAMES)
    assert ParseDict(told, GetSongResponse()) == kept


async def test_both_spellings_of_a_field_are_read(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        for metadata in ({"durationS": 4}, {"duration_s": 4}):
            path = await create(http, metadata=metadata)
            told = (await http.get(path)).json()
            assert told["song"]["request"]["metadata"]["durationS"] == 4


async def test_an_idempotency_key_makes_nothing_again(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        names = {
            (await http.post("/v1/songs", json=REQUEST, headers={"Idempotency-Key": key})).json()["song"]["name"]
            for key in ("once", "once", "twice")
        }
        answer = await http.post("/v1/songs", json=REQUEST, headers={"Idempotency-Key": "x" * 65})
    assert len(names) == 2
    assert answer.status_code == 400
    assert answer.json()["error"]["violations"][0]["field"] == "Idempotency-Key"


async def test_songs_are_listed_in_pages_cancelled_and_deleted(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment, client(deployment) as http:
        paths = [await create(http) for _ in range(3)]
        first = (await http.get("/v1/songs?page_size=2")).json()
        rest = (await http.get(f"/v1/songs?page_size=2&page_token={first['nextPageToken']}")).json()
        cancelled = (await http.post(f"{paths[0]}/cancel")).json()
        deleted = await http.delete(paths[1])
        gone = await http.get(paths[1])
        listened = await http.get(f"{paths[0]}/audio.mp3")
        empty = (await http.get("/v1/adapters")).json()
    assert [f"/v1/{song['name']}" for song in first["songs"] + rest["songs"]] == paths[::-1]
    assert rest["nextPageToken"] == ""
    assert cancelled["song"]["state"] == "SONG_STATE_CANCELLED"
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert (gone.status_code, gone.json()["error"]["reason"]) == (404, "SONG_UNKNOWN")
    assert (listened.status_code, listened.json()["error"]["reason"]) == (410, "SONG_CANCELLED")
    assert empty == {"adapters": [], "nextPageToken": ""}


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (b"{", "body", "is no JSON"),
        (b"[1]", "body", "is no JSON object"),
        (b"\xff", "body", "is no JSON"),
        (b'{"captoin": "a"}', "body", "captoin"),
        (b'{"caption": 3}', "body", "caption"),
        (b"[" * 100_000, "body", "nested too deep"),
        (rb'{"\ud800": 1}', "body", "half of a surrogate pair"),
        (rb'{"metadata": {"\udfff": 2}}', "body", "half of a surrogate pair"),
        (rb'{"task": {"repaint": {"mode": "\ud800"}}}', "body", "half of a surrogate pair"),
        (rb'{"lyrics": "la\ud800"}', "body", "half of a surrogate pair"),
        (json.dumps({"caption": "a" * (MAX_CAPTION_CHARS + 1)}).encode(), "caption", "at most 2048"),
        (b'"' + b"a" * (1 << 20) + b'"', "body", "more than 1048576 bytes"),
    ],
)
async def test_a_bad_body_is_refused_by_name(deploy: Deploy, body: bytes, field: str, says: str) -> None:
    async with deploy() as deployment, client(deployment) as http:
        answer = await http.post("/v1/songs", content=body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["status"]) == (400, 3, "INVALID_ARGUMENT")
    assert error["violations"][0]["field"] == field
    assert says in error["violations"][0]["description"]


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("sample_rate_hz=8000", ["sample_rate_hz"]),
        ("gain_db=loud&fade_in_s=61", ["fade_in_s", "gain_db"]),
        ("variant=-1", ["variant"]),
        ("variant=1", ["variant"]),
        ("variant=0&variant=0", ["variant"]),
        ("sample_format=s8", ["sample_format"]),
        ("max_buffer_s=1e999", ["max_buffer_s"]),
        ("volume=11", ["volume"]),
        ("download=2", ["download"]),
    ],
)
async def test_a_bad_query_is_refused_by_name(deploy: Deploy, query: str, fields: list[str]) -> None:
    async with deploy() as deployment, client(deployment) as http:
        answer = await http.get(f"{await create(http)}/audio.wav?{query}")
    assert answer.status_code == 400
    assert sorted(violation["field"] for violation in answer.json()["error"]["violations"]) == fields


@pytest.mark.parametrize(
    ("path", "field", "says"),
    [
        ("/waveform?bins=0", "bins", "is '0'; must be a whole number from 1 to 4000"),
        ("/waveform?bins=1000000000000", "bins", "is '1000000000000'; must be a whole number from 1 to 4000"),
        ("/audio.wav?variant=1000000000", "variant", "is '1000000000'; must be a whole number from 0 to 7"),
        ("/audio.wav?channels=99999999999", "channels", "must be a whole number from 0 to 4294967295"),
        ("?page_size=1000000000", "page_size", "is '1000000000'; must be a whole number from 1 to 100"),
    ],
)
async def test_a_number_out_of_range_is_told_the_range(deploy: Deploy, path: str, field: str, says: str) -> None:
    async with deploy() as deployment, client(deployment) as http:
        song = "/v1/songs" if path.startswith("?") else await create(http)
        [violation] = (await http.get(f"{song}{path}")).json()["error"]["violations"]
    assert violation["field"] == field
    assert says in violation["description"]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/songs", "GET, HEAD, POST"),
        ("/v1/songs/x", "DELETE, GET, HEAD"),
        ("/v1/assets", "POST"),
        ("/static/page.js", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_all_that_would_do(deploy: Deploy, path: str, allowed: str) -> None:
    async with deploy() as deployment, client(deployment) as http:
        answer = await http.put(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    assert answer.json()["error"]["message"] == f"this path takes {allowed}"


async def test_what_is_not_there_is_not_found(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        song = await create(http)
        for path in (
            "/v1/songs/nothing",
            "/v1/songs/nothing/audio.wav",
            "/v1/songs/nothing/events",
            "/v1/songs/nothing/waveform",
            "/v1/songs/nothing/hls/index.m3u8",
            "/v1/songs/%2e%2e/hls/init.mp4",
            f"{song}/audio.aiff",
            f"{song}/hls/secret",
            "/v2",
        ):
            assert (await http.get(path)).status_code == 404, path
        answer = await http.put("/v1/songs")
    assert (answer.status_code, answer.json()["error"]["reason"]) == (405, "METHOD_UNKNOWN")


async def test_overload_says_when_to_come_back(deploy: Deploy) -> None:
    async with deploy(Stuck("dit"), max_songs=1) as deployment, client(deployment) as http:
        await create(http)
        answer = await http.post("/v1/songs", json=REQUEST)
        metrics = (await http.get("/metrics")).text
    assert answer.status_code == 429
    assert answer.json()["error"]["retryAfterS"] == 1
    assert answer.headers["retry-after"] == "1"
    assert 'soundstage_refused_total{what="songs"} 1.0' in metrics
    assert 'soundstage_in_flight{what="songs"} 1.0' in metrics


async def test_a_failed_song_is_an_error_and_no_empty_file(deploy: Deploy) -> None:
    async with deploy(Broken("dit")) as deployment, client(deployment) as http:
        path = await create(http)
        for extension in ("wav", "webm"):
            answer = await http.get(f"{path}/audio.{extension}")
            assert answer.status_code == 500
            assert "secret" not in answer.text
            assert "dit" in answer.json()["error"]["message"]


async def test_head_is_refused_as_get_is(deploy: Deploy) -> None:
    async with deploy(Broken("dit")) as deployment, client(deployment) as http:
        path = await create(http)
        for what in ("audio.wav", "audio.webm?variant=7", "audio.aiff", "hls/index.m3u8", "events?x=1"):
            asked, headed = await http.get(f"{path}/{what}"), await http.head(f"{path}/{what}")
            assert (headed.status_code, headed.content) == (asked.status_code, b""), what
            assert headed.status_code >= 400


async def test_a_song_that_fails_while_it_plays_is_cut_and_not_ended(deploy: Deploy) -> None:
    async with deploy(Broken("vae")) as deployment, client(deployment) as http:
        path = await create(http)
        with pytest.raises(httpx2.RemoteProtocolError):
            await http.get(f"{path}/audio.wav")
        await until(lambda: not deployment.listeners.in_flight)


@pytest.mark.parametrize("extension", ["wav", "mp3", "ogg", "webm", "flac", "m4a"])
async def test_a_live_song_is_heard_before_it_is_decoded(deploy: Deploy, extension: str) -> None:
    vae = Gradual("vae")
    async with deploy(vae) as deployment, client(deployment) as http:
        path = await create(http)
        headers = {"Range": "bytes=0-"}  # as browsers ask
        vae.allowed.release()
        async with http.stream("GET", f"{path}/audio.{extension}", headers=headers) as answer:
            assert answer.status_code == 200
            assert "accept-ranges" not in answer.headers
            assert "content-length" not in answer.headers
            pieces = answer.aiter_raw()
            data = await anext(pieces)
            for _ in range(8):
                vae.allowed.release()
            async for piece in pieces:
                data += piece
    assert FRAMES <= num_frames(data) <= FRAMES + 3000


async def test_a_listener_that_goes_away_frees_its_place_and_the_codec(deploy: Deploy) -> None:
    vae = Gradual("vae")
    async with deploy(vae, max_listeners=1) as deployment, client(deployment) as http:
        path = await create(http)
        async with http.stream("GET", f"{path}/audio.wav") as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            full = await http.get(f"{path}/audio.wav")
        await until(lambda: vae.is_left and not deployment.listeners.in_flight)
    assert full.status_code == 429


async def test_a_listener_that_waits_in_vain_frees_its_place(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment, client(deployment) as http:
        path = await create(http)
        waiting = asyncio.create_task(http.get(f"{path}/audio.wav"))
        await until(lambda: deployment.listeners.in_flight == 1)
        waiting.cancel()
        await until(lambda: not deployment.listeners.in_flight)


async def test_a_client_that_takes_nothing_is_left(deploy: Deploy) -> None:
    async with deploy(stall_timeout_s=0.3) as deployment:
        async with client(deployment) as http:
            path = await create(http, metadata={"durationS": 600}, planner={"enabled": False})
        host, port = deployment.http.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(f"GET {path}/audio.wav HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        await reader.readline()
        await until(lambda: deployment.listeners.in_flight == 1)
        await until(lambda: not deployment.listeners.in_flight)
        writer.close()


@pytest.mark.parametrize("extension", ["wav", "mp3", "ogg", "webm", "flac", "m4a"])
async def test_a_finished_song_is_a_file_in_any_range(deploy: Deploy, extension: str) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = f"{await finish(http)}/audio.{extension}"
        whole = await http.get(path)
        size = len(whole.content)
        cuts = [0, 1, 1000, size // 2, size]
        parts = [
            await http.get(path, headers={"Range": f"bytes={first}-{after - 1}"}) for first, after in pairwise(cuts)
        ]
        tail = await http.get(path, headers={"Range": "bytes=-100"})
        head = await http.head(path)
        beyond = await http.get(path, headers={"Range": f"bytes={size}-"})
        several = await http.get(path, headers={"Range": "bytes=0-1,5-6"})
        odd = await http.get(path, headers={"Range": "pages=1-2"})
        known = await http.get(path, headers={"If-None-Match": whole.headers["etag"]})
        any_known = await http.head(path, headers={"If-None-Match": "*"})
        other = await http.get(path, params={"gain_db": -6})
        changed = await http.get(path, headers={"Range": "bytes=0-9", "If-Range": other.headers["etag"]})
        named = await http.get(path, params={"download": 1})
    assert whole.headers["accept-ranges"] == "bytes"
    assert int(whole.headers["content-length"]) == size
    assert {part.status_code for part in parts} == {206}
    assert b"".join(part.content for part in parts) == whole.content
    assert parts[1].headers["content-range"] == f"bytes 1-999/{size}"
    assert tail.content == whole.content[-100:]
    assert (head.content, head.headers["content-length"]) == (b"", str(size))
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")
    assert (several.status_code, several.content) == (200, whole.content)
    assert (odd.status_code, odd.content) == (200, whole.content)
    assert (known.status_code, known.content) == (304, b"")
    assert (any_known.status_code, any_known.content) == (304, b"")
    assert other.headers["etag"] != whole.headers["etag"]
    assert (changed.status_code, changed.content) == (200, whole.content)
    assert named.headers["content-disposition"].endswith(f'.{extension}"')
    with av.open(io.BytesIO(whole.content), "r") as file:
        assert file.duration is not None
        assert abs(file.duration / av.time_base - 4) < 0.01


# 192 000 frames are no whole number of a codec's blocks at any of these rates.
@pytest.mark.parametrize("rate_hz", [48_000, 44_100, 24_000])
@pytest.mark.parametrize("extension", ["wav", "mp3", "ogg", "webm", "flac", "m4a"])
async def test_a_finished_file_is_the_song_and_nothing_before_or_behind_it(
    deploy: Deploy, extension: str, rate_hz: int
) -> None:
    if extension in ("ogg", "webm") and rate_hz == 44_100:
        pytest.skip("Opus knows no such rate")
    async with deploy() as deployment, client(deployment) as http:
        path = await finish(http)
        query = {"sample_rate_hz": str(rate_hz), "gain_db": 20, "fade_in_s": 0.5, "fade_out_s": 0.5}
        exact = (await http.get(f"{path}/audio.wav", params={**query, "sample_format": "f32"})).content
        found = (await http.get(f"{path}/audio.{extension}", params=query)).content
    heard, wanted = samples_of(found), samples_of(exact)
    if extension in ("ogg", "webm"):  # FFmpeg gives all Opus at 48 kHz, and Opus passes no such slow waves
        assert len(heard) == FRAMES
    else:
        assert heard.shape == wanted.shape
        np.testing.assert_allclose(heard, wanted, atol=2e-3)


def samples_of(data: bytes) -> NDArray[np.float32]:
    """What a player hears of a file that honours what it says of its beginning and its end, [frames, 2]."""
    with av.open(io.BytesIO(data), "r") as file:
        stream = file.streams.audio[0]
        length = stream.duration if file.format.name.startswith("mov") else None  # FFmpeg plays MP4's last block whole
        resampler = av.AudioResampler("flt", "stereo")
        frames = [whole for frame in file.decode(stream) for whole in resampler.resample(frame)]
    return np.concatenate([frame.to_ndarray().reshape(-1, 2) for frame in frames])[:length].astype(np.float32)


async def test_a_finished_wav_is_the_song_to_the_bit(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await finish(http)
        data = (await http.get(f"{path}/audio.wav")).content
        song = StreamAudioRequest(song=path.removeprefix("/v1/"))
        pcm = b"".join(
            [response.audio_chunk.data async for response in SongServiceStub(deployment.channel).StreamAudio(song)]
        )
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="int16")
    assert rate_hz == 48_000
    assert samples.tobytes() == pcm
    assert int.from_bytes(data[4:8], "little") == len(data) - 8
    assert int.from_bytes(data[40:44], "little") == len(pcm)


async def test_a_range_of_what_is_not_decoded_waits_for_it(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await create(http)
        await http.get(f"{path}/events")  # made, but never decoded
        part = await http.get(f"{path}/audio.wav", headers={"Range": "bytes=44-47"})
    assert (part.status_code, part.headers["content-range"]) == (206, f"bytes 44-47/{44 + 4 * FRAMES}")


async def test_files_are_kept_while_there_is_room(deploy: Deploy) -> None:
    async with deploy(shelf_limit_bytes=2_000_000) as deployment, client(deployment) as http:
        path = await finish(http)
        for gain_db in range(-6, 0):
            answer = await http.get(f"{path}/audio.wav", params={"gain_db": gain_db})
            assert len(answer.content) == 44 + 4 * FRAMES
        kept = deployment.shelf.size_bytes
        await http.delete(path)
        left = deployment.shelf.size_bytes
    assert 0 < kept <= 2_000_000
    assert left == 0


async def test_a_file_is_finished_though_its_client_goes_away(deploy: Deploy, tmp_path: Path) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await finish(http)
        held = Held(when=lambda: not deployment.listeners.in_flight)  # when the song is encoded
        asyncio.get_running_loop().set_default_executor(held)
        asking = asyncio.create_task(http.get(f"{path}/audio.webm?download=1"))
        await held.begun.wait()
        await leave(http, asking)
        held.may_go_on.set()
        await until(lambda: bool(deployment.shelf.size_bytes))
        [folder] = (tmp_path / "shelf").iterdir()
    assert [file.name for file in folder.iterdir()] == ["audio"]


async def test_events_come_as_they_happen_and_go_on_where_they_were_left(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await create(http)
        answer = await http.get(f"{path}/events")
        told = events(answer.text)
        rest = events((await http.get(f"{path}/events", headers={"Last-Event-ID": told[2]["id"]})).text)
        bad = await http.get(f"{path}/events", headers={"Last-Event-ID": "first"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    kinds = [event["event"] for event in told]
    assert (kinds[0], kinds[-2:]) == ("accepted", ["completed", "end"])
    assert {"plan", "progress", "queued"} <= set(kinds)
    assert json.loads(told[0]["data"])["accepted"]["seeds"] == [7]
    assert told[-1]["data"] == "{}"
    assert rest == told[3:]
    assert bad.status_code == 400


async def test_events_end_with_the_songs_error(deploy: Deploy) -> None:
    async with deploy(Broken("dit")) as deployment, client(deployment) as http:
        told = events((await http.get(f"{await create(http)}/events")).text)
    assert told[-1]["event"] == "end"
    assert json.loads(told[-1]["data"])["error"]["status"] == "UNKNOWN" or "dit" in told[-1]["data"]


async def test_a_watcher_too_many_is_told_when_to_come_back(deploy: Deploy) -> None:
    async with deploy(Stuck("dit"), max_watchers=1) as deployment, client(deployment) as http:
        path = await create(http)
        async with http.stream("GET", f"{path}/events") as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            refused = await http.get(f"{path}/events")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["error"]["reason"] == "QUEUE_FULL"


async def test_a_song_that_waits_for_a_stage_says_when_to_come_back(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment, client(deployment) as http:
        path = await create(http)
    async with deploy(late="dit") as deployment, client(deployment) as http:
        answers = [await http.get(f"{path}/{what}") for what in ("events", "audio.wav")]
    assert [answer.status_code for answer in answers] == [503, 503]
    assert all(answer.headers["retry-after"] for answer in answers)
    assert {answer.json()["error"]["reason"] for answer in answers} == {"SONG_WAITS"}


async def test_the_head_of_the_events_does_not_wait_for_news(deploy: Deploy) -> None:
    async with deploy(Stuck("dit")) as deployment, client(deployment) as http:
        path = await create(http)
        last = ""
        async with http.stream("GET", f"{path}/events") as answer:
            async for line in answer.aiter_lines():
                last = line.removeprefix("id: ") if line.startswith("id: ") else last
                if "progress" in line and "STAGE_DIT" in line:
                    break
        async with http.stream("GET", f"{path}/events", headers={"Last-Event-ID": last}) as answer:
            assert (answer.status_code, await anext(answer.aiter_raw())) == (200, b": nothing new\n\n")


async def test_a_waveform_draws_itself_while_the_song_is_decoded(deploy: Deploy) -> None:
    vae = Gradual("vae")
    async with deploy(vae) as deployment, client(deployment) as http:
        path = await create(http)
        await http.get(f"{path}/events")
        before = (await http.get(f"{path}/waveform?bins=8")).json()
        asked = len(vae.requests)
        async with http.stream("GET", f"{path}/audio.wav") as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            for _ in range(3):
                vae.allowed.release()
            while len((await http.get(f"{path}/waveform?bins=8")).json()["bins"]) < 4:
                await anext(pieces)
            for _ in range(8):
                vae.allowed.release()
            async for _ in pieces:
                pass
        after = (await http.get(f"{path}/waveform?bins=8")).json()
        bad = await http.get(f"{path}/waveform?bins=4001")
    assert before == {"numBins": 8, "bins": []}
    assert asked == 0
    assert len(after["bins"]) == 8
    steps = np.array(after["bins"]) * 32_767
    np.testing.assert_allclose(steps[:, 0], 7 + np.arange(8) * 12.5 // 1, atol=1e-2)
    assert bad.status_code == 400


async def test_lyrics_are_aligned(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await finish(http)
        told = (await http.get(f"{path}/lyrics")).json()
    assert [line["text"] for line in told["lines"]] == ["[verse]", "song-of-seed-7"]


async def test_a_file_becomes_an_asset(deploy: Deploy) -> None:
    data = sound_file(words(48_000), 48_000, "FLAC", "PCM_16")
    async with deploy() as deployment, client(deployment) as http:
        answer = await http.post("/v1/assets", content=data)
        bad = await http.post("/v1/assets", content=b"no music")
        empty = await http.post("/v1/assets")
        kept = deployment.assets.find(answer.json()["asset"])
    assert answer.status_code == 201
    assert answer.json()["durationS"] == 1
    assert kept is not None
    assert {bad.status_code, empty.status_code} == {400}


@pytest.mark.parametrize("path", ["/v1/assets", "/v1/songs"])
async def test_a_client_that_goes_away_while_it_sends_leaves_nothing_behind(deploy: Deploy, path: str) -> None:
    async with deploy() as deployment, client(deployment) as http:
        host, port = deployment.http.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\nabc".encode())
        if path == "/v1/assets":
            await until(lambda: deployment.uploads.in_flight == 1)
        writer.close()
        await until(lambda: not deployment.uploads.in_flight)
        assert (await http.get("/v1/songs")).json()["songs"] == []


async def test_a_client_that_goes_away_while_its_song_is_accepted_ends_that(deploy: Deploy) -> None:
    vae = Stuck("vae")
    async with deploy(vae) as deployment, client(deployment) as http:
        path = await create(http)
        await http.get(f"{path}/events")
        asking = asyncio.create_task(http.post("/v1/songs", json=REQUEST | {"references": [path.removeprefix("/v1/")]}))
        async with asyncio.timeout(10):
            await vae.begun.wait()  # the reference is decoded before the song is accepted
            asking.cancel()
            await vae.cancelled.wait()
        assert len((await http.get("/v1/songs")).json()["songs"]) == 1


async def test_the_catalog_is_told(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        capabilities = (await http.get("/v1/capabilities")).json()
        models = (await http.get("/v1/models?page_size=2")).json()
        bad = await http.get("/v1/models?page_size=1000")
    assert capabilities["maxSongsInFlight"] == 16
    assert len(models["models"]) == 2
    assert models["nextPageToken"] == "2"
    assert bad.status_code == 400


async def test_health_tells_of_draining_and_calls_in_flight_end(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        assert (await http.get("/healthz")).json() == {"status": "SERVING"}
        closing = asyncio.create_task(deployment.door.close(drain_s=0.5))
        await asyncio.sleep(0)
        answer = await http.get("/healthz")
        await closing
        with pytest.raises(httpx2.ConnectError):
            await http.get("/healthz")
    assert (answer.status_code, answer.json()) == (503, {"status": "NOT_SERVING"})


async def test_metrics_count_calls_songs_and_waits(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await finish(http)
        await http.get(f"{path}?{'x' * 100}=1")
        await http.get("/nowhere")
        await SongServiceStub(deployment.channel).GetSong(GetSongRequest(song=path.removeprefix("/v1/")))
        told = (await http.get("/metrics")).text
    for line in (
        'soundstage_songs_total{state="completed"} 1.0',
        'soundstage_stage_seconds_count{stage="dit"} 1.0',
        "soundstage_first_audio_seconds_count 1.0",
        'soundstage_rpc_seconds_count{code="ok",method="/soundstage.music.v1.SongService/GetSong"} 1.0',
        'soundstage_http_seconds_count{method="GET",route="get_song",status="400"} 1.0',
        'soundstage_http_seconds_count{method="GET",route="none",status="404"} 1.0',
    ):
        assert line in told, line
    sent = dict(re.findall(r'soundstage_sent_bytes_total{door="(\w+)"} (\S+)', told))
    assert float(sent["http"]) > 4 * FRAMES
    assert float(sent["grpc"]) > 100
    assert "xxx" not in told
