"""HTTP Live Streaming: playlists that grow, and segments that fit together."""

import asyncio
import io
import re
import subprocess
from pathlib import Path

import av
import httpx2
import numpy as np
import pytest

from .conftest import Broken, Deploy, Steady, Stuck
from .web import Gradual, Held, client, create, leave, until

FRAMES = 5 * 48_000
BLOCK = 1024  # of AAC, the last of which is filled up


async def segments(http: httpx2.AsyncClient, path: str) -> tuple[str, bytes]:
    """Return a playlist, and all that it names joined."""
    answer = await http.get(f"{path}/hls/index.m3u8")
    assert answer.status_code == 200, answer.text
    names = re.findall(r'URI="([^"]+)"|^([^#\n]+)', answer.text, re.MULTILINE)
    return answer.text, b"".join([(await http.get(f"{path}/hls/{a or b}")).content for a, b in names])


async def whole(http: httpx2.AsyncClient, path: str) -> tuple[str, bytes]:
    """Follow a playlist to its end."""
    async with asyncio.timeout(20):
        while True:
            playlist, data = await segments(http, path)
            if "#EXT-X-ENDLIST" in playlist:
                return playlist, data


async def test_a_playlist_tells_a_song_without_a_gap(deploy: Deploy) -> None:
    async with deploy() as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        playlist, data = await whole(http, path)
        flat = (await http.get(f"{path}/audio.wav?sample_format=f32")).content
    lengths_s = [float(found) for found in re.findall(r"#EXTINF:([0-9.]+)", playlist)]
    assert len(lengths_s) == 3
    assert all(1.9 < length_s < 2.1 for length_s in lengths_s[:-1])
    assert "#EXT-X-PLAYLIST-TYPE:EVENT" in playlist
    assert re.findall(r"#EXT-X-TARGETDURATION:(\d+)", playlist) == ["2"]
    with av.open(io.BytesIO(data), "r") as file:
        frames = list(file.decode(audio=0))
    starts = np.array([frame.pts for frame in frames])
    np.testing.assert_array_equal(np.diff(starts), [frame.samples for frame in frames[:-1]])
    heard = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    assert FRAMES <= heard.shape[1] < FRAMES + BLOCK
    with av.open(io.BytesIO(flat), "r") as file:
        told = np.concatenate([frame.to_ndarray().reshape(-1, 2).T for frame in file.decode(audio=0)], axis=1)
    assert np.abs(heard[:, :FRAMES] - told).max() < 2e-3


async def test_a_playlist_grows_while_the_song_is_decoded(deploy: Deploy) -> None:
    vae = Gradual("vae")
    async with deploy(vae, max_listeners=1) as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        for _ in range(5):
            vae.allowed.release()
        playlist, _ = await segments(http, path)
        early = await http.get(f"{path}/hls/2.m4s")
        assert "ENDLIST" not in playlist
        assert deployment.listeners.in_flight == 1
        for _ in range(10):
            vae.allowed.release()
        playlist, _ = await whole(http, path)
        later = await http.get(f"{path}/hls/2.m4s")
        await until(lambda: not deployment.listeners.in_flight)
    assert (early.status_code, early.json()["error"]["reason"]) == (404, "SEGMENT_UNKNOWN")
    assert later.status_code == 200


async def test_a_song_is_encoded_once_for_all_and_again_alike(deploy: Deploy) -> None:
    vae = Steady("vae")
    async with deploy(vae) as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        found = await asyncio.gather(*(whole(http, path) for _ in range(3)))
        assert len(vae.requests) == 1
        deployment.shelf.remove(path)
        again = await whole(http, path)
    assert set(found) == {again}


@pytest.mark.parametrize("stage", ["dit", "vae"])
async def test_a_song_that_fails_fails_its_playlist_every_time(deploy: Deploy, stage: str) -> None:
    async with deploy(Broken(stage)) as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        for _ in range(2):
            answer = await http.get(f"{path}/hls/index.m3u8")
            assert answer.status_code == 500
            assert stage in answer.json()["error"]["message"]
        await until(lambda: not deployment.listeners.in_flight)


async def test_a_playlist_that_nobody_asks_for_any_more_ends(deploy: Deploy) -> None:
    async with deploy(Stuck("vae"), hls_idle_s=0.05) as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        waiting = asyncio.create_task(http.get(f"{path}/hls/index.m3u8"))
        await until(lambda: deployment.listeners.in_flight == 1)
        waiting.cancel()
        await until(lambda: not deployment.listeners.in_flight)


async def test_a_playlist_that_is_left_while_it_begins_can_be_asked_for_again(deploy: Deploy) -> None:
    async with deploy(hls_idle_s=0) as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        await http.get(f"{path}/audio.wav")
        held = Held(when=lambda: True)
        asyncio.get_running_loop().set_default_executor(held)
        asking = asyncio.create_task(http.get(f"{path}/hls/index.m3u8"))
        await held.begun.wait()
        await leave(http, asking)
        held.may_go_on.set()
        await until(lambda: not deployment.listeners.in_flight)
        async with asyncio.timeout(5):
            assert (await http.get(f"{path}/hls/index.m3u8")).status_code == 200


async def test_a_playlist_that_is_asked_for_as_it_is_left_begins_again(deploy: Deploy) -> None:
    async with deploy(hls_idle_s=0) as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        await http.get(f"{path}/audio.wav")
        held = Held(when=lambda: True)
        asyncio.get_running_loop().set_default_executor(held)
        asking = asyncio.create_task(http.get(f"{path}/hls/index.m3u8"))
        await held.begun.wait()
        await leave(http, asking)
        again = asyncio.create_task(http.get(f"{path}/hls/index.m3u8"))
        await http.get("/healthz")
        held.may_go_on.set()
        async with asyncio.timeout(5):
            answer = await again
    assert answer.status_code == 200, answer.text


@pytest.mark.players
async def test_ffmpeg_plays_a_live_playlist_to_its_end(deploy: Deploy, tmp_path: Path) -> None:
    vae = Gradual("vae")
    out = tmp_path / "heard.wav"
    async with deploy(vae) as deployment, client(deployment) as http:
        path = await create(http, metadata={"durationS": 5})
        url = f"{deployment.http}{path}/hls/index.m3u8"
        for _ in range(5):
            vae.allowed.release()
        await http.get(url)
        player = await asyncio.create_subprocess_exec(
            "ffmpeg", "-nostdin", "-loglevel", "error", "-live_start_index", "0", "-i", url, str(out),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        await until(lambda: out.exists())  # it plays before the song is whole
        for _ in range(10):
            vae.allowed.release()
        _, told = await asyncio.wait_for(player.communicate(), 30)
    assert (player.returncode, told) == (0, b"")
    with av.open(str(out)) as file:
        heard = sum(frame.samples for frame in file.decode(audio=0))
    assert FRAMES <= heard < FRAMES + 2 * BLOCK  # of a playlist FFmpeg 5 leaves nothing out
