from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

from soundstage.stage.v1.vae_service_pb2_grpc import add_VaeServiceServicer_to_server
from soundstage_cli.tiny.vae import write_vae
from soundstage_runtime.admission import Admission
from soundstage_runtime.serve import Server, Service
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine
from soundstage_vae.servicer import SongCodec, VaeServicer

# Serves a codec on a free port, as VaeServicer(codec, admission) would be, and gives a channel to it.
Serving = Callable[..., AbstractAsyncContextManager[grpc.aio.Channel]]


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    write_vae(folder)
    return folder


@pytest.fixture(scope="session")
def codec(tiny_vae: Path) -> Codec:
    return Codec(tiny_vae, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="session")
def oracle(tiny_vae: Path) -> AutoencoderOobleck:
    """The same weights in diffusers' own hands."""
    return AutoencoderOobleck.from_pretrained(tiny_vae).requires_grad_(False)


@pytest.fixture
def engine(codec: Codec) -> Iterator[VaeEngine]:
    engine = VaeEngine(codec, Worker("vae"), windows=(32, 64, 128))
    yield engine
    engine.close()


@pytest.fixture
def small_engine(codec: Codec) -> Iterator[VaeEngine]:
    """Windows of 32 frames: many tiles in little time."""
    engine = VaeEngine(codec, Worker("vae"), windows=(32,))
    yield engine
    engine.close()


@pytest.fixture
def serving() -> Serving:
    @asynccontextmanager
    async def serve(
        codec: SongCodec, admission: Admission | None = None, *, idle_timeout_s: float = 30.0
    ) -> AsyncGenerator[grpc.aio.Channel]:
        admission = admission or Admission("VAE calls", limit=4)
        servicer = VaeServicer(codec, admission, idle_timeout_s=idle_timeout_s)
        service = Service(
            name="soundstage.stage.v1.VaeService", add=lambda server: add_VaeServiceServicer_to_server(servicer, server)
        )
        async with Server([service]) as server, grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield channel

    return serve
