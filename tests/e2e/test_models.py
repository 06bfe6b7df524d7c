"""Two diffusion models in one process, a LoRA that PEFT wrote, and a full stage, through real processes."""

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from soundstage.music.v1.catalog_service_pb2 import LoadAdapterRequest
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceStub
from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, GenerateSongResponse
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.stage.v1.dit_service_pb2 import DenoiseRequest, DenoiseSetup
from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceStub
from soundstage.stage.v1.stage_service_pb2 import DescribeRequest
from soundstage.stage.v1.stage_service_pb2_grpc import StageServiceStub
from soundstage_cli.tiny.dit import original_name
from soundstage_runtime.tensors import from_proto

MODELS = ("acestep-v15-turbo", "acestep-v15-xl-turbo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a deployment answers."""

    gateway: str
    dit: str


@pytest.fixture(scope="module")
def deployment(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """A deployment whose diffusion stage has two models, a LoRA at hand, and room for one song at a time."""
    folder = tmp_path_factory.mktemp("up-models")
    write_lora(models / "diffusers" / MODELS[0] / "transformer", folder / "adapters" / "warm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "soundstage_cli.app", "up", "--models", str(models / "original"), "--port", "0"]
    command += ["--dit", ",".join(str(models / "original" / name) for name in MODELS), "--dit-port", str(port)]
    environment = os.environ | {
        "SOUNDSTAGE_DIT_ADAPTER_DIR": str(folder / "adapters"),
        "SOUNDSTAGE_DIT_MAX_IN_FLIGHT": "1",
        "SOUNDSTAGE_VAE_WINDOW_FRAMES": "32",
    }
    log = folder / "log"
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as up,
    ):
        assert up.stdout is not None
        line = up.stdout.readline()
        try:
            assert line.startswith("soundstage is ready at "), log.read_text()
            yield Addresses(gateway=line.split()[-1], dit=f"127.0.0.1:{port}")
        finally:
            up.terminate()
            up.wait(60)


def write_lora(transformer: Path, folder: Path) -> None:
    """Give a model's attention a random LoRA with PEFT, and save it under the released checkpoints' names."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model: Any = AceStepTransformer1DModel.from_pretrained(transformer)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    source = torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.15, generator=source)
    adapted.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    save_file({original_name(name): tensor for name, tensor in load_file(weights).items()}, weights)


async def generate(address: str, **fields: Any) -> AsyncIterator[GenerateSongResponse]:
    """Make a short song of words alone."""
    values: dict[str, Any] = {"planner": {"enabled": False}, "metadata": {"duration_s": 1}, "diffusion": {"steps": 3}}
    request = GenerateSongRequest(caption="a bright tune", seeds=[7], **values | fields)
    async with grpc.aio.insecure_channel(address) as channel:
        async for event in SongServiceStub(channel).GenerateSong(request):
            yield event


async def pcm_of(address: str, **fields: Any) -> bytes:
    """Make a short song; returns its PCM."""
    events = [event async for event in generate(address, **fields)]
    assert events[-1].HasField("completed")
    return b"".join(event.audio_chunk.data for event in events)


async def test_a_lora_changes_a_song_the_same_way_every_time(deployment: Addresses) -> None:
    async with grpc.aio.insecure_channel(deployment.gateway) as channel:
        request = LoadAdapterRequest(adapter="adapters/warm", path="warm")
        loaded = (await CatalogServiceStub(channel).LoadAdapter(request)).adapter
    assert (loaded.kind, loaded.rank) == ("lora", 4)
    plain = await pcm_of(deployment.gateway)
    adapted, again, unmoved = [
        await pcm_of(deployment.gateway, adapters=[{"name": "adapters/warm", "scale": scale}]) for scale in (1, 1, 0)
    ]
    assert adapted == again
    assert unmoved == plain
    samples = [np.frombuffer(pcm, np.int16).astype(np.float64) for pcm in (plain, adapted)]
    assert np.abs(samples[0] - samples[1]).max() > 0.01 * np.abs(samples[0]).max()


async def test_a_song_is_made_by_the_model_that_it_names(deployment: Addresses) -> None:
    default, by_name, large, by_variant = [
        await pcm_of(deployment.gateway, model=model)
        for model in ("", f"models/dit/{MODELS[0]}", f"models/dit/{MODELS[1]}", "xl-turbo")
    ]
    assert default == by_name
    assert large == by_variant
    assert large != default


def setup_of(**fields: Any) -> DenoiseSetup:
    """A song for the stage."""
    return DenoiseSetup(caption="a bright tune", lyrics="la", seed=7, **fields)


async def latents_of(stub: Any, setup: DenoiseSetup) -> NDArray[np.float32]:
    """Make latents at the stage."""
    chunks = [
        from_proto(response.latents.tensor, "latents", shape=(None, 64))
        async for response in stub.Denoise(iter([DenoiseRequest(setup=setup)]))
        if response.HasField("latents")
    ]
    return np.concatenate(chunks)


async def test_a_request_chooses_between_the_models_of_a_process(deployment: Addresses) -> None:
    async with grpc.aio.insecure_channel(deployment.dit) as channel:
        served = (await StageServiceStub(channel).Describe(DescribeRequest())).models
        assert [(model.name, model.variant) for model in served] == list(
            zip(MODELS, ("turbo", "xl-turbo"), strict=True)
        )
        stub = DitServiceStub(channel)
        default, small, large = [
            await latents_of(stub, setup_of(latent_frames=50, options={"steps": 3}, model_fingerprint=fingerprint))
            for fingerprint in ("", *(model.model_fingerprint for model in served))
        ]
    assert np.array_equal(default, small)
    assert np.abs(small - large).max() > 0.1


async def test_a_song_is_told_that_it_waits_while_the_stage_is_full(deployment: Addresses) -> None:
    async with grpc.aio.insecure_channel(deployment.dit) as channel:
        long = setup_of(latent_frames=6_000, options={"steps": 20})
        holder = DitServiceStub(channel).Denoise(iter([DenoiseRequest(setup=long)]))
        assert (await anext(aiter(holder))).progress.step == 1
        told: list[str | None] = []
        async for event in generate(deployment.gateway):
            told.append(event.WhichOneof("event"))
            if event.HasField("queued"):
                assert event.queued.position == 0
                holder.cancel()
    assert told.count("queued") == 1
    assert told.index("queued") < told.index("progress")
    assert told[-1] == "completed"
