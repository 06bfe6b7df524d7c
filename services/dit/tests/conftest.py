"""Tiny checkpoints, written once; the same networks loaded here and by diffusers; a server for them."""

import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline

from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceStub, add_DitServiceServicer_to_server
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_cli.tiny.dit import Version, write_diffusers, write_original
from soundstage_cli.tiny.vae import write_vae
from soundstage_dit.adapter_card import AdapterCard
from soundstage_dit.adapters import Loan
from soundstage_dit.engine import DitEngine
from soundstage_dit.servicer import AdapterShelf, DitServicer, SongModel
from soundstage_dit.weights import LoadedModel, load
from soundstage_runtime.admission import Admission
from soundstage_runtime.serve import Server, Service
from soundstage_runtime.worker import Worker

if TYPE_CHECKING:
    from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceAsyncStub

CPU = torch.device("cpu")
TURBO = StageModel(name="tiny", variant="turbo")  # an engine knows its first model by no fingerprint


def card_of(model: LoadedModel) -> StageModel:
    """What a stage says of a model."""
    return StageModel(name=model.name, variant=model.variant, model_fingerprint=model.model_fingerprint)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with original/acestep-v15-{turbo,xl-turbo,base} and pipeline{,-xl,-base}, pairs of the same weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    kinds: tuple[tuple[str, bool, Version], ...] = (
        ("pipeline", False, "turbo"),
        ("pipeline-xl", True, "turbo"),
        ("pipeline-base", False, "base"),
    )
    write_vae(root / "vae")
    for name, xl, version in kinds:
        write_original(root / "original", xl=xl, version=version)
        folder = write_diffusers(root / name, xl=xl, version=version)
        shutil.copytree(root / "vae", folder / "vae")
    return root


@pytest.fixture(scope="session")
def model(checkpoints: Path) -> LoadedModel:
    """The tiny 2B-like model."""
    return load(checkpoints / "original/acestep-v15-turbo", text_encoder=None, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="session")
def xl_model(checkpoints: Path) -> LoadedModel:
    """The tiny XL-like model."""
    return load(checkpoints / "original/acestep-v15-xl-turbo", text_encoder=None, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="session")
def base_model(checkpoints: Path) -> LoadedModel:
    """The tiny 2B-like model's weights, to be guided."""
    return load(checkpoints / "original/acestep-v15-base", text_encoder=None, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="session")
def pipeline(checkpoints: Path) -> AceStepPipeline:
    """The same 2B-like weights in diffusers."""
    pipe = AceStepPipeline.from_pretrained(checkpoints / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def xl_pipeline(checkpoints: Path) -> AceStepPipeline:
    """The same XL-like weights in diffusers."""
    return AceStepPipeline.from_pretrained(checkpoints / "pipeline-xl")


@pytest.fixture(scope="session")
def base_pipeline(checkpoints: Path) -> AceStepPipeline:
    """The weights of the base model in diffusers."""
    pipe = AceStepPipeline.from_pretrained(checkpoints / "pipeline-base")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
async def engine(model: LoadedModel) -> AsyncIterator[DitEngine]:
    """The tiny model's engine."""
    engine = DitEngine([model], Worker("dit"), max_batch=4)
    yield engine
    engine.close()


class Bare:
    """A shelf with no adapters, and no room for any."""

    def cards(self) -> list[AdapterCard]:
        return []

    async def load(self, name: str, path: str, model_fingerprint: str) -> AdapterCard:
        raise NotImplementedError

    def find(self, uses: Sequence[tuple[str, float]], model_fingerprint: str) -> Loan:
        return Loan([])

    def unload(self, name: str) -> None:
        raise NotImplementedError


class Serving:
    """A server with one DitService, and a stub for it."""

    def __init__(
        self,
        model: SongModel,
        *,
        adapters: AdapterShelf | None = None,
        models: Sequence[StageModel] = (TURBO,),
        max_in_flight: int = 4,
        idle_timeout_s: float = 30.0,
    ) -> None:
        self.admission = Admission("songs", limit=max_in_flight)
        servicer = DitServicer(
            model, self.admission, adapters=adapters or Bare(), models=models, idle_timeout_s=idle_timeout_s
        )
        self._server = Server(
            [
                Service(
                    name="soundstage.stage.v1.DitService",
                    add=lambda server: add_DitServiceServicer_to_server(servicer, server),
                )
            ]
        )

    async def __aenter__(self) -> "DitServiceAsyncStub":
        await self._server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{self._server.port}")
        return DitServiceStub(self.channel)

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await self._server.stop()
