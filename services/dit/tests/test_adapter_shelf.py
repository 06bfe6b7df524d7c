"""Adapters over gRPC and in songs: loaded from one directory only, forgotten while they are at work."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from soundstage.stage.v1.dit_service_pb2 import (
    DenoiseRequest,
    DenoiseSetup,
    ListAdaptersRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from soundstage.type.v1.options_pb2 import AdapterUse, DiffusionOptions
from soundstage_dit.adapter_file import adaptable
from soundstage_dit.adapters import AdapterExistsError, AdapterNotFoundError, Adapters, NoAdapterFolderError
from soundstage_dit.engine import DitEngine
from soundstage_dit.schedule import schedule
from soundstage_dit.song import Diffusion, Song
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import InvalidRequestError, OverloadedError
from soundstage_runtime.worker import Worker

from .conftest import Serving

if TYPE_CHECKING:
    from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceAsyncStub

LAYER = "layers.1.self_attn.q_proj"
RANK_1_BYTES = 2 * 64 * 4


@pytest.fixture
def folder(model: LoadedModel, tmp_path: Path) -> Path:
    """A directory of adapters: one-layer `small`, and `piano` and `drums`, which change every layer."""
    root = tmp_path / "adapters"
    root.mkdir()
    save_file(lora(["layers.1.self_attn.q_proj"], model, rank=1), root / "small.safetensors")
    for rank, name in enumerate(("piano", "drums"), start=2):
        save_file(lora(list(adaptable(model.dit)), model, rank=rank), root / f"{name}.safetensors")
    return root


def lora(layers: list[str], model: LoadedModel, *, rank: int) -> dict[str, torch.Tensor]:
    """A random LoRA of these layers."""
    source = torch.Generator().manual_seed(rank)
    tensors: dict[str, torch.Tensor] = {}
    for name in layers:
        linear = adaptable(model.dit)[name]
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=source) * 0.1
        tensors[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=source) * 0.1
    return tensors


Shelf = Callable[..., Adapters]


@pytest.fixture
async def shelf(model: LoadedModel, folder: Path) -> AsyncIterator[Shelf]:
    """Make shelves over the directory."""
    worker = Worker("dit")

    def make(**limits: int) -> Adapters:
        return Adapters([model], worker, folder=folder, **limits)

    yield make
    worker.close()


def song_of(*adapters: tuple[str, float], frames: int = 60, steps: int = 3) -> Song:
    """A short song with adapters."""
    diffusion = Diffusion(times=tuple(schedule(steps, 3.0)))
    return Song(caption="a", lyrics="la", num_frames=frames, seed=1, diffusion=diffusion, adapters=adapters)


async def finish(engine: DitEngine, song: Song) -> NDArray[np.float32]:
    """Denoise to the end."""
    *_, latents = [event async for event in engine.denoise(song)]
    assert isinstance(latents, np.ndarray)
    return latents


async def test_songs_with_unlike_adapters_share_steps_and_are_each_as_alone(model: LoadedModel, shelf: Shelf) -> None:
    adapters = shelf()
    for name in ("piano", "drums"):
        await adapters.load(name, f"{name}.safetensors")
    engine = DitEngine([model], Worker("dit"), adapters=adapters)
    mixes = [(("piano", 1.0),), (), (("drums", -0.5), ("piano", 2.0)), (("piano", 0.0),)]
    songs = [song_of(*mix, frames=40 + 30 * index) for index, mix in enumerate(mixes)]
    together = await asyncio.gather(*(finish(engine, song) for song in songs))
    for song, latents in zip(songs, together, strict=True):
        np.testing.assert_allclose(latents, await finish(engine, song), atol=1e-5, rtol=1e-5)
        plain = await finish(engine, song_of(frames=song.num_frames))
        is_changed = bool(np.abs(latents - plain).max() > 0.05)
        assert is_changed == any(scale for _, scale in song.adapters)
    engine.close()


async def test_a_song_without_adapters_is_the_same_to_the_bit_where_some_are_loaded(
    model: LoadedModel, shelf: Shelf, engine: DitEngine
) -> None:
    adapters = shelf()
    await adapters.load("piano", "piano.safetensors")
    furnished = DitEngine([model], Worker("dit"), adapters=adapters)
    assert np.array_equal(await finish(furnished, song_of()), await finish(engine, song_of()))
    furnished.close()


async def test_a_song_keeps_an_adapter_that_is_unloaded_meanwhile(model: LoadedModel, shelf: Shelf) -> None:
    adapters = shelf()
    await adapters.load("piano", "piano.safetensors")
    engine = DitEngine([model], Worker("dit"), adapters=adapters, max_songs=1)
    expected = await finish(engine, song_of(("piano", 1.0)))
    events = engine.denoise(song_of(("piano", 1.0)))
    waiting = asyncio.create_task(finish(engine, song_of(("piano", 1.0))))
    assert await anext(events) is not None
    adapters.unload("piano")
    *_, latents = [event async for event in events]
    assert isinstance(latents, np.ndarray)
    assert np.array_equal(latents, expected)
    assert np.array_equal(await waiting, expected)
    with pytest.raises(AdapterNotFoundError, match="'piano', which is not loaded; loaded: none"):
        await finish(engine, song_of(("piano", 1.0)))
    engine.close()


@pytest.mark.parametrize(
    "path", ["..", "../secret.safetensors", "/etc/passwd", "out.safetensors", "linked", "a\0b", "a" * 300, "circle"]
)
async def test_nothing_outside_of_the_directory_is_read(shelf: Shelf, folder: Path, path: str) -> None:
    secret = folder.parent / "secret.safetensors"
    os.link(folder / "small.safetensors", secret)
    (folder / "out.safetensors").symlink_to(secret)
    (folder / "linked").mkdir()
    (folder / "linked" / "adapter_model.safetensors").symlink_to(secret)
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises((InvalidRequestError, AdapterNotFoundError), match="path"):
        await shelf().load("a", path)


async def test_a_link_inside_the_directory_is_followed(shelf: Shelf, folder: Path) -> None:
    (folder / "linked.safetensors").symlink_to(folder / "small.safetensors")
    assert (await shelf().load("a", "linked.safetensors")).rank == 1


async def test_number_and_memory_of_adapters_are_bounded(shelf: Shelf, folder: Path) -> None:
    adapters = shelf(max_count=2, max_bytes=(folder / "small.safetensors").stat().st_size + RANK_1_BYTES)
    with pytest.raises(OverloadedError, match="'piano' takes"):
        await adapters.load("piano", "piano.safetensors")
    cards = [await adapters.load(name, "small.safetensors") for name in ("b", "a")]
    assert [card.size_bytes for card in cards] == [RANK_1_BYTES] * 2
    with pytest.raises(OverloadedError, match="2 adapters are loaded, as many as may be"):
        await adapters.load("c", "small.safetensors")
    assert [card.name for card in adapters.cards()] == ["a", "b"]
    adapters.unload("a")
    with pytest.raises(AdapterExistsError):
        await adapters.load("b", "small.safetensors")
    await adapters.load("c", "small.safetensors")


async def test_two_loads_at_once_do_not_share_the_last_place(shelf: Shelf) -> None:
    adapters = shelf(max_count=1)
    loads = [adapters.load(name, "small.safetensors") for name in ("a", "b")]
    found = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(one) for one in found][1] is OverloadedError
    assert [card.name for card in adapters.cards()] == ["a"]


async def test_without_a_directory_nothing_is_loaded(model: LoadedModel) -> None:
    worker = Worker("dit")
    with pytest.raises(NoAdapterFolderError, match="--adapter-dir"):
        await Adapters([model], worker).load("a", "small.safetensors")
    worker.close()


async def denoise(stub: "DitServiceAsyncStub", *adapters: AdapterUse) -> None:
    """Make a short song with adapters."""
    setup = DenoiseSetup(
        caption="a", lyrics="la", latent_frames=5, options=DiffusionOptions(steps=1), adapters=adapters
    )
    async for _ in stub.Denoise(iter([DenoiseRequest(setup=setup)])):
        pass


async def test_adapters_are_loaded_listed_used_and_unloaded(model: LoadedModel, shelf: Shelf) -> None:
    adapters = shelf()
    engine = DitEngine([model], Worker("dit"), adapters=adapters)
    async with Serving(engine, adapters=adapters) as stub:
        loaded = (await stub.LoadAdapter(LoadAdapterRequest(name="soft.piano-1", path="small.safetensors"))).adapter
        assert (loaded.name, loaded.kind, loaded.rank, loaded.size_bytes) == ("soft.piano-1", "lora", 1, RANK_1_BYTES)
        assert list((await stub.ListAdapters(ListAdaptersRequest())).adapters) == [loaded]
        await denoise(stub, AdapterUse(name="soft.piano-1", scale=0.5))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await denoise(stub, AdapterUse(name="strings"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == "adapters[0].name is 'strings', which is not loaded; loaded: soft.piano-1"
        await stub.UnloadAdapter(UnloadAdapterRequest(name="soft.piano-1"))
        assert not (await stub.ListAdapters(ListAdaptersRequest())).adapters
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.UnloadAdapter(UnloadAdapterRequest(name="soft.piano-1"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    engine.close()


@pytest.mark.parametrize(
    ("name", "path", "code", "says"),
    [
        ("a/b", "", grpc.StatusCode.INVALID_ARGUMENT, "name is 'a/b'; must be 1 to 64 letters"),
        ("", "small.safetensors", grpc.StatusCode.INVALID_ARGUMENT, "name is ''"),
        ("a", "", grpc.StatusCode.INVALID_ARGUMENT, "path is empty"),
        ("a", "../adapters/../x", grpc.StatusCode.INVALID_ARGUMENT, "leads out of the directory of adapters"),
        ("a", "nothing.safetensors", grpc.StatusCode.NOT_FOUND, "path is 'nothing.safetensors'"),
        ("a", ".", grpc.StatusCode.FAILED_PRECONDITION, "save the adapter as safetensors"),
    ],
)
async def test_a_load_that_cannot_be_says_what_would_do(
    engine: DitEngine, shelf: Shelf, name: str, path: str, code: grpc.StatusCode, says: str
) -> None:
    async with Serving(engine, adapters=shelf()) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.LoadAdapter(LoadAdapterRequest(name=name, path=path))
    assert caught.value.code() is code
    assert says in str(caught.value.details())
