"""Several models in one process: each gives what it gives alone, they take turns, and on a small device they swap."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Model

from soundstage.stage.v1.dit_service_pb2 import (
    AlignRequest,
    DenoiseRequest,
    DenoiseSetup,
    ListAdaptersRequest,
    LoadAdapterRequest,
    UnloadAdapterRequest,
)
from soundstage.type.v1.options_pb2 import AdapterUse, DiffusionOptions
from soundstage_dit.adapter_file import adaptable
from soundstage_dit.adapters import Adapters
from soundstage_dit.engine import DitEngine
from soundstage_dit.model.dit import Dit
from soundstage_dit.models import SameModelError, load_models
from soundstage_dit.residence import ModelTooLargeError, Residence, check_size, sizes_of
from soundstage_dit.schedule import schedule
from soundstage_dit.scheduler import Load, Queued, Room, take_turn
from soundstage_dit.settings import DitSettings
from soundstage_dit.song import Diffusion, Song
from soundstage_dit.weights import LoadedModel, load
from soundstage_runtime.errors import read_details
from soundstage_runtime.settings import load_settings
from soundstage_runtime.worker import Worker

from .conftest import Serving, card_of
from .test_engine import Stepwise
from .test_scheduler import Endless

CPU = torch.device("cpu")
TOLERANCE = 1e-5
Latents = NDArray[np.float32]


@pytest.fixture(scope="module")
def pair(checkpoints: Path) -> list[LoadedModel]:
    """The small and the large turbo model, with one text encoder; networks of this module's own."""
    shared: dict[str, Qwen3Model] = {}
    folders = [checkpoints / "original" / name for name in ("acestep-v15-turbo", "acestep-v15-xl-turbo")]
    return [
        load(folder, text_encoder=None, device=CPU, dtype=torch.float32, text_encoders=shared) for folder in folders
    ]


class Elsewhere:
    """A device beside the CPU: weights that are not on it are gone from the networks, and numbers with them."""

    def __init__(self, models: Sequence[LoadedModel]) -> None:
        self._kept: dict[nn.Module, dict[str, Tensor]] = {}
        self.moves: list[str] = []
        self.fails = False
        for part in {part for model in models for part in model.parts}:
            self._empty(part)

    def take(self, part: nn.Module) -> None:
        """Bring a part back."""
        if self.fails:
            raise RuntimeError("out of memory")
        self.moves.append(f"+{type(part).__name__}")
        part.load_state_dict(self._kept.pop(part))

    def send(self, part: nn.Module) -> None:
        """Take a part away."""
        if part not in self._kept:
            self.moves.append(f"-{type(part).__name__}")
            self._empty(part)

    def restore(self) -> None:
        """Bring back all that are away."""
        for part in list(self._kept):
            part.load_state_dict(self._kept.pop(part))

    def _empty(self, part: nn.Module) -> None:
        self._kept[part] = {name: tensor.clone() for name, tensor in part.state_dict().items()}
        with torch.no_grad():
            for tensor in part.state_dict().values():
                tensor.fill_(torch.nan)


@asynccontextmanager
async def small_device(
    models: Sequence[LoadedModel], *, max_bytes: int
) -> AsyncGenerator[tuple[Elsewhere, Residence, DitEngine]]:
    """An engine on a device that holds no more than that."""
    elsewhere = Elsewhere(models)
    residence = Residence(models, max_bytes=max_bytes, take=elsewhere.take, send=elsewhere.send)
    engine = DitEngine(models, Worker("dit"), residence=residence)
    try:
        yield elsewhere, residence, engine
    finally:
        engine.close()
        elsewhere.restore()


def bytes_of(*models: LoadedModel) -> int:
    """What models take together."""
    return sum({part: size for model in models for part, size in sizes_of(model).items()}.values())


def song_of(model: LoadedModel, *, seed: int = 0, steps: int = 3, frames: int = 60) -> Song:
    """A short song of a model."""
    diffusion = Diffusion(times=tuple(schedule(steps, 3.0)))
    return Song(
        caption="a", lyrics="la", num_frames=frames, seed=seed, diffusion=diffusion, model=model.model_fingerprint
    )


async def finish(engine: DitEngine, song: Song) -> Latents:
    """Denoise to the end."""
    *_, latents = [event async for event in engine.denoise(song)]
    assert isinstance(latents, np.ndarray)
    return latents


async def alone(model: LoadedModel, song: Song) -> Latents:
    """What a model makes where there is no other."""
    engine = DitEngine([model], Worker("dit"))
    latents = await finish(engine, song)
    engine.close()
    return latents


async def test_songs_of_two_models_interleave_and_are_each_as_alone(pair: list[LoadedModel]) -> None:
    engine = DitEngine(pair, Worker("dit"))
    songs = [song_of(pair[index % 2], seed=index, frames=30 + 20 * index) for index in range(4)]
    together = await asyncio.gather(*(finish(engine, song) for song in songs))
    engine.close()
    for index, (song, latents) in enumerate(zip(songs, together, strict=True)):
        np.testing.assert_allclose(latents, await alone(pair[index % 2], song), atol=TOLERANCE, rtol=TOLERANCE)
    other = replace(songs[0], model=pair[1].model_fingerprint)
    assert np.abs(together[0] - await alone(pair[1], other)).max() > 0.05


async def test_models_take_steps_in_turn(pair: list[LoadedModel]) -> None:
    order: list[int] = []

    class Noting(Stepwise):
        def __call__(self, latents: Sequence[Tensor], *others: object) -> list[Tensor]:
            order.append(noting.index(self))
            return super().__call__(latents, *others)  # pyright: ignore[reportArgumentType]

    noting = [Noting(model.dit) for model in pair]
    engine = DitEngine(
        [replace(model, dit=cast(Dit, dit)) for model, dit in zip(pair, noting, strict=True)], Worker("dit")
    )
    for dit in noting:
        dit.allow(100)
    songs = [song_of(pair[0], seed=1, steps=6), song_of(pair[0], seed=2, steps=6), song_of(pair[1], steps=6)]
    await asyncio.gather(*(finish(engine, song) for song in songs))
    engine.close()
    assert order == [0, 1] * 6
    assert noting[0].batches == [2] * 6


def test_a_step_is_of_one_model_that_of_the_song_that_has_had_least() -> None:
    songs = [Endless(10, used=5, model="a"), Endless(10, used=4, model="b"), Endless(10, used=9, model="b")]
    assert take_turn(songs, max_songs=8, max_tokens=7500) == songs[1:]


def test_models_that_do_not_fit_beside_one_another_are_not_in_use_at_once() -> None:
    room = Room(max_songs=8, max_bytes=10, max_model_bytes=100)
    shared = {0: 30}
    a, b = (Load(tokens_left=1, size_bytes=1, parts=shared | {part: 40}) for part in (1, 2))
    assert room.fits([a, a], a)
    assert not room.fits([a], b)
    assert room.fits([a], replace(b, parts=shared | {2: 30}))


async def test_results_before_and_after_a_swap_are_equal_to_the_bit(
    pair: list[LoadedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    songs = [song_of(model) for model in pair]
    expected = [await alone(model, song) for model, song in zip(pair, songs, strict=True)]
    async with small_device(pair, max_bytes=max(map(bytes_of, pair))) as (elsewhere, residence, engine):
        for index in (0, 1, 0, 1):
            assert np.array_equal(await finish(engine, songs[index]), expected[index])
            assert [residence.has(model) for model in pair] == [index == 0, index == 1]
        codes = [code async for run in engine.tokenize(once(expected[0])) for code in run]
        assert residence.has(pair[0])
        lines = await engine.align(songs[1], expected[1])
        assert residence.has(pair[1])
    assert elsewhere.moves.count("+Dit") == 6
    assert capsys.readouterr().out.count("model_brought_in") == 6
    # The text encoder is of both, so it stays.
    assert elsewhere.moves.count("+Qwen3Model") == 1
    assert "-Qwen3Model" not in elsewhere.moves
    large = DitEngine(pair, Worker("dit"))
    assert codes == [code async for run in large.tokenize(once(expected[0])) for code in run]
    assert lines == await large.align(songs[1], expected[1])
    large.close()


async def once(latents: Latents) -> AsyncIterator[Latents]:
    """Latents in one run."""
    yield latents


async def test_a_model_in_use_stays_and_the_song_of_another_waits_its_turn(pair: list[LoadedModel]) -> None:
    first, second, third = song_of(pair[0], steps=4), song_of(pair[1]), song_of(pair[0], seed=1)
    expected = [await alone(pair[index], song) for index, song in ((0, first), (1, second), (0, third))]
    ended: list[int] = []
    queued: dict[int, list[int]] = {0: [], 1: [], 2: []}
    async with small_device(pair, max_bytes=max(map(bytes_of, pair))) as (_, _, engine):

        async def follow(number: int, song: Song) -> None:
            async for event in engine.denoise(song):
                if isinstance(event, Queued):
                    queued[number].append(event.position)
                elif isinstance(event, np.ndarray):
                    assert np.array_equal(event, expected[number])
            ended.append(number)

        await asyncio.gather(*(follow(number, song) for number, song in enumerate((first, second, third))))
    assert ended == [0, 1, 2]
    # Each is told when its model comes, those that wait for room before it too.
    assert queued == {0: [0], 1: [0, 0], 2: [1, 0, 0]}


async def test_a_visit_waits_for_a_model_that_has_no_room_and_passes_songs_that_wait_for_a_place(
    pair: list[LoadedModel],
) -> None:
    async with small_device(pair, max_bytes=max(map(bytes_of, pair))) as (_, residence, engine):
        song = engine.denoise(song_of(pair[0], steps=8))
        await anext(song)
        latents = np.zeros((5, 64), np.float32)
        tokenized = asyncio.create_task(anext(engine.tokenize(once(latents), pair[1].model_fingerprint)))
        events = [event async for event in song]
        assert len(events) == 9
        assert len(await tokenized) == 1
        assert residence.has(pair[1])


@pytest.fixture(scope="module")
def three(pair: list[LoadedModel], checkpoints: Path) -> list[LoadedModel]:
    """Three models of one size, of which none shares a part."""
    folder = checkpoints / "original/acestep-v15-turbo"
    return [
        replace(load(folder, text_encoder=None, device=CPU, dtype=torch.float32), name=name, model_fingerprint=name)
        for name in "abc"
    ]


def test_the_least_recently_used_model_makes_room(three: list[LoadedModel]) -> None:
    a, b, c = three
    elsewhere = Elsewhere(three)
    residence = Residence(three, max_bytes=2 * bytes_of(a), take=elsewhere.take, send=elsewhere.send)

    def here() -> str:
        return "".join(model.name for model in three if residence.has(model))

    for model, in_use, expected in (
        (a, [a], "a"),
        (b, [b], "ab"),
        (a, [a], "ab"),
        (c, [c], "ac"),
        (b, [b, a], "ab"),
        (c, [c, a], "ac"),
        (b, [b, c], "bc"),
    ):
        residence.bring_in(model, in_use)
        assert here() == expected
    assert elsewhere.moves.count("+Dit") == 6
    elsewhere.restore()


def test_a_model_that_fails_to_come_in_is_not_taken_for_one_that_did(three: list[LoadedModel]) -> None:
    elsewhere = Elsewhere(three)
    residence = Residence(three, max_bytes=bytes_of(three[0]), take=elsewhere.take, send=elsewhere.send)
    elsewhere.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        residence.bring_in(three[0], [])
    assert not residence.has(three[0])
    elsewhere.fails = False
    residence.bring_in(three[0], [])
    assert residence.has(three[0])
    elsewhere.restore()


def test_a_model_that_never_fits_is_refused_with_the_figures(pair: list[LoadedModel]) -> None:
    large = bytes_of(pair[1])
    with pytest.raises(ModelTooLargeError, match=rf"max_models_gb is .*acestep-v15-xl-turbo take {large / 1e9:.4g} GB"):
        Residence(pair, max_bytes=large - 1, take=print, send=print)
    check_size(pair, bytes_of(*pair))
    with pytest.raises(ModelTooLargeError, match="acestep-v15-turbo and acestep-v15-xl-turbo take"):
        check_size(pair, bytes_of(*pair) - 1)


def settings_of(*arguments: str) -> DitSettings:
    """Settings of these flags."""
    return load_settings(DitSettings, ["--device", "cpu", *arguments])


def test_models_are_named_by_flags_and_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of("--model", "a", "--model", "b").model == ["a", "b"]
    assert settings_of("--model", "a, b").model == ["a", "b"]
    monkeypatch.setenv("SOUNDSTAGE_DIT_MODEL", "a,b/c")
    assert settings_of().model == ["a", "b/c"]


def test_no_model_at_all_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOUNDSTAGE_DIT_MODEL", raising=False)
    for arguments in ([], ["--model", ","]):
        with pytest.raises(SystemExit):
            settings_of(*arguments)
        assert "SOUNDSTAGE_DIT_MODEL (or --model)" in capsys.readouterr().err


def test_models_that_are_loaded_together_share_an_equal_text_encoder(checkpoints: Path, tmp_path: Path) -> None:
    small, large = (str(checkpoints / "original" / name) for name in ("acestep-v15-turbo", "acestep-v15-xl-turbo"))
    models, residence = load_models(settings_of("--model", small, "--model", large), CPU, torch.float32)
    assert residence is None
    assert [model.name for model in models] == ["acestep-v15-turbo", "acestep-v15-xl-turbo"]
    assert len({part for model in models for part in model.parts}) == 2 * 5 - 1
    with pytest.raises(SameModelError, match="two models are called acestep-v15-turbo"):
        load_models(settings_of("--model", f"{small},{small}"), CPU, torch.float32)
    again = tmp_path / "again"
    again.symlink_to(small)
    encoder = str(checkpoints / "original/Qwen3-Embedding-0.6B")
    with pytest.raises(SameModelError, match="acestep-v15-turbo and again are the same model"):
        load_models(settings_of("--model", f"{small},{again}", "--text-encoder", encoder), CPU, torch.float32)
    with pytest.raises(ModelTooLargeError):
        load_models(settings_of("--model", f"{small},{large}", "--max-models-gb", "0.001"), CPU, torch.float32)


async def denoise(stub: object, **fields: object) -> str:
    """Make a short song; returns its handle."""
    setup = DenoiseSetup(caption="a", lyrics="la\nla", latent_frames=20, options=DiffusionOptions(steps=1))
    setup.MergeFrom(DenoiseSetup(**fields))  # pyright: ignore[reportArgumentType]
    *_, last = [response async for response in stub.Denoise(iter([DenoiseRequest(setup=setup)]))]  # type: ignore[attr-defined]
    return last.done.handle


async def test_adapters_belong_to_a_model_and_a_handle_to_its_adapters(pair: list[LoadedModel], tmp_path: Path) -> None:
    for number, model in enumerate(pair):
        layer = adaptable(model.dit)["layers.1.self_attn.q_proj"]
        tensors = {"lora_A": torch.ones(1, layer.in_features), "lora_B": torch.ones(layer.out_features, 1)}
        path = tmp_path / f"{number}.safetensors"
        save_file({f"layers.1.self_attn.q_proj.{name}.weight": value for name, value in tensors.items()}, path)
    worker = Worker("dit")
    adapters = Adapters(pair, worker, folder=tmp_path)
    engine = DitEngine(pair, worker, adapters=adapters)
    small, large = (model.model_fingerprint for model in pair)
    async with Serving(engine, adapters=adapters, models=list(map(card_of, pair))) as stub:
        await stub.LoadAdapter(LoadAdapterRequest(name="first", path="0.safetensors"))
        await stub.LoadAdapter(LoadAdapterRequest(name="named", path="1.safetensors", model="acestep-v15-xl-turbo"))
        await stub.LoadAdapter(LoadAdapterRequest(name="hashed", path="1.safetensors", model=large))
        listed = (await stub.ListAdapters(ListAdaptersRequest())).adapters
        assert {card.name: card.model_fingerprint for card in listed} == {
            "first": small,
            "named": large,
            "hashed": large,
        }
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.LoadAdapter(LoadAdapterRequest(name="a", path="1.safetensors", model="b"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "model is 'b'; must be acestep-v15-turbo or acestep-v15-xl-turbo" in (caught.value.details() or "")
        uses = [AdapterUse(name="named")]
        handle = await denoise(stub, adapters=uses, model_fingerprint=large)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await denoise(stub, adapters=uses)
        assert read_details(caught.value).reason == "ADAPTER_MISMATCH"
        expected = "adapters[0].name is 'named', which was loaded for the model acestep-v15-xl-turbo"
        assert (caught.value.details() or "").startswith(expected)

        assert len((await stub.Align(AlignRequest(handle=handle))).lines) == 2
        await stub.UnloadAdapter(UnloadAdapterRequest(name="named"))
        await stub.LoadAdapter(LoadAdapterRequest(name="named", path="1.safetensors", model=large))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Align(AlignRequest(handle=handle))
        assert read_details(caught.value).reason == "ADAPTER_GONE"
    engine.close()
