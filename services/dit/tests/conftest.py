"""Tiny checkpoints, written once; the same networks loaded here and by diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline

from soundstage_cli.tiny.dit import write_diffusers, write_original
from soundstage_cli.tiny.vae import write_vae
from soundstage_dit.weights import LoadedModel, load

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with original/acestep-v15[-xl]-turbo, pipeline and pipeline-xl, each pair of the same weights."""
    root = tmp_path_factory.mktemp("checkpoints")
    for xl in (False, True):
        write_original(root / "original", xl=xl)
        folder = write_diffusers(root / ("pipeline-xl" if xl else "pipeline"), xl=xl)
        write_vae(folder / "vae")
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
def pipeline(checkpoints: Path) -> AceStepPipeline:
    """The same 2B-like weights in diffusers."""
    pipe = AceStepPipeline.from_pretrained(checkpoints / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def xl_pipeline(checkpoints: Path) -> AceStepPipeline:
    """The same XL-like weights in diffusers."""
    return AceStepPipeline.from_pretrained(checkpoints / "pipeline-xl")
