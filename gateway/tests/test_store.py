"""Songs in a database and their folders."""

import subprocess
import sys
from pathlib import Path

import pytest

from soundstage.music.v1.song_service_pb2 import (
    SONG_STATE_CANCELLED,
    SONG_STATE_COMPLETED,
    GenerateSongResponse,
    Plan,
    Song,
)
from soundstage.type.v1.tensor_pb2 import Tensor
from soundstage_gateway.store import KeptSong, Store
from soundstage_runtime.errors import StartError


async def keep(store: Store, name: str, *, size_bytes: int, expire_time_s: int) -> None:
    kept = KeptSong(song=Song(name=name, state=SONG_STATE_COMPLETED))
    kept.song.expire_time.seconds = expire_time_s
    await store.add(kept)
    store.write_latents(name, 0, Tensor(data=bytes(size_bytes)))
    await store.update(kept)


async def test_what_has_expired_makes_room_before_what_has_not(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=2_500)
    await store.open()
    for name, expire_time_s in (("songs/a", 100), ("songs/b", 100), ("songs/c", 10), ("songs/d", 100)):
        await keep(store, name, size_bytes=1_000, expire_time_s=expire_time_s)
    assert await store.sweep(now_s=10) == ["songs/c", "songs/a"]
    assert [kept.name for kept in (await store.page(9, before=None))[0]] == ["songs/d", "songs/b"]
    assert await store.sweep(now_s=11) == []
    await store.close()


async def test_files_of_songs_that_were_never_written_down_are_gone_with_the_next_process(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=10_000)
    await store.open()
    await keep(store, "songs/a", size_bytes=1_000, expire_time_s=100)
    store.folder_of("songs/b").mkdir()
    await store.close()
    await store.open()
    await store.close()
    assert [folder.name for folder in (tmp_path / "songs").iterdir()] == ["a"]


async def test_what_is_written_of_a_song_counts_too(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=10_000)
    await store.open()
    for number in range(30):
        song = Song(name=f"songs/{number}", state=SONG_STATE_CANCELLED)
        song.request.lyrics = "la " * 500
        song.expire_time.seconds = 100
        kept = KeptSong(song=song)
        await store.add(kept)
        kept.events.append(GenerateSongResponse(plan=Plan(caption="la " * 500)))
        await store.update(kept)
    assert len(await store.sweep(now_s=10)) == 27  # three of 3 kB fit
    await store.close()


async def test_a_page_of_large_songs_ends_early(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_bytes=10_000)
    await store.open()
    sizes = [100, 300_000, 200_000, 700_000, 200_000]
    for number, size in enumerate(sizes):
        song = Song(name=f"songs/{number}", state=SONG_STATE_CANCELLED)
        song.request.lyrics = "x" * size
        await store.add(KeptSong(song=song))
    pages: list[list[str]] = []
    last = None
    while not pages or last:
        page, last = await store.page(9, before=last)
        pages.append([kept.name for kept in page])
    await store.close()
    assert pages == [["songs/4"], ["songs/3"], ["songs/2", "songs/1", "songs/0"]]


async def test_a_folder_has_one_store_at_a_time(tmp_path: Path) -> None:
    first, second = (Store(tmp_path, limit_bytes=1_000) for _ in range(2))
    await first.open()
    with pytest.raises(StartError, match=f"data_dir is {tmp_path}, where another gateway keeps its songs; stop that"):
        await second.open()
    await first.close()
    await second.open()
    await second.close()


@pytest.mark.parametrize(
    ("name", "why"), [("file", "File exists"), ("file/in", "Not a directory"), ("garbage", "file is not a database")]
)
def test_a_folder_that_cannot_be_used_stops_the_start_with_one_line(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "songs.sqlite").write_bytes(b"no database " * 100)
    command = [sys.executable, "-m", "soundstage_gateway", "--port", "0", "--http-port", "0"]
    ended = subprocess.run([*command, "--data-dir", tmp_path / name], stderr=subprocess.PIPE, text=True, timeout=60)
    last_words = f"data_dir is {tmp_path / name}, where no songs can be kept: {why}; give a folder that can be written"
    assert (ended.returncode, last_words in ended.stderr, "Traceback" in ended.stderr) == (1, True, False), ended.stderr
