"""Songs in a database and their folders."""

from pathlib import Path

from soundstage.music.v1.song_service_pb2 import SONG_STATE_COMPLETED, Song
from soundstage.type.v1.tensor_pb2 import Tensor
from soundstage_gateway.store import KeptSong, Store


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
