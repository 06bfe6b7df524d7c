"""What a song is made from lies on disk, whatever its size."""

import tracemalloc
from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
import pytest

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage_gateway.audio_file import Samples
from soundstage_gateway.material import Material, load_source
from soundstage_gateway.order import Order, read_order
from soundstage_gateway.sound import OpenSound
from soundstage_runtime.errors import InvalidRequestError

LONG = 120 * 48_000
MB = 1 << 20


async def count(start: int, stop: int) -> AsyncGenerator[Samples, None]:
    """A sound whose samples are their own places, in pieces of half a second."""
    for first in range(start, stop, 24_000):
        places = np.arange(first, min(first + 24_000, stop), dtype=np.float32)
        yield places[:, None].repeat(2, axis=1)


async def be_silent(start: int, stop: int) -> AsyncGenerator[Samples, None]:
    yield np.zeros((stop - start, 2), np.float32)


SOUNDS = {
    "songs/long": OpenSound(num_frames=LONG, read=count),
    "songs/mute": OpenSound(num_frames=LONG, read=be_silent),
}


def order(source: str, *references: str) -> Order:
    request = GenerateSongRequest(source=source, references=references, variants=2, seeds=[1, 2])
    request.task.cover.strength = 1
    return read_order(request, SOUNDS, draw_seed=lambda: 0)


async def test_a_source_and_references_of_any_length_take_little_memory(tmp_path: Path) -> None:
    wanted = order("songs/long", "songs/long", "songs/long")
    tracemalloc.start()
    try:
        material = await Material.gather(tmp_path, wanted, SOUNDS)
        source, windows = material.source(), [material.references(wanted, variant) for variant in range(2)]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert source.nbytes + sum(heard.nbytes for pair in windows for heard in pair) == 8 * (LONG + 4 * 30 * 48_000)
    assert peak_bytes < 2 * MB  # of 92
    assert np.array_equal(source[:, 0], np.arange(LONG, dtype=np.float32))
    for pair in windows:
        for heard in pair:
            assert [len(set(np.diff(window[:, 0]))) for window in np.split(heard, 3)] == [1, 1, 1]
    assert not np.array_equal(windows[0][0], windows[1][0])


async def test_what_is_gathered_is_found_again_and_only_when_it_is_whole(tmp_path: Path) -> None:
    gathered = await Material.gather(tmp_path, order("songs/mute", "songs/long"), SOUNDS)
    found = Material.read(tmp_path)
    assert found is not None
    assert found.sounds == gathered.sounds
    assert (found.sounds["songs/mute"].is_silent, found.sounds["songs/long"].is_silent) == (True, False)
    assert len(load_source(tmp_path)) == LONG
    with pytest.raises(InvalidRequestError, match=r"references\[1\] is songs/mute, which is silent"):
        await Material.gather(tmp_path / "other", order("songs/long", "songs/long", "songs/mute"), SOUNDS)
    assert Material.read(tmp_path / "other") is None
