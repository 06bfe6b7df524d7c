"""Settings of the diffusion process: flags, or environment variables that begin with SOUNDSTAGE_DIT_."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import NoDecode, SettingsConfigDict

from soundstage_budget.need import Offload, Quantization
from soundstage_runtime.score import DURATION_RANGE_S
from soundstage_runtime.settings import StageSettings


def _split(models: object) -> object:
    """Split what came as one text, or as a list of such, at its commas."""
    texts: list[object] = [models] if isinstance(models, str) else models if isinstance(models, list) else []
    return [part.strip() for text in texts if isinstance(text, str) for part in text.split(",") if part.strip()]


_Texts = Annotated[list[str], NoDecode, BeforeValidator(_split)]


class DitSettings(StageSettings):
    """The diffusion stage. Every flag is also an environment variable: --model is SOUNDSTAGE_DIT_MODEL."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_DIT_")

    model: _Texts = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        min_length=1,
        description="checkpoints, each a directory or a hub id owner/name[/folder]: the flag once for each, or commas "
        "between them; the first is the default one",
    )
    port: int = Field(50052, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    text_encoder: str = Field(
        "", description="directory or hub id of the text encoder; empty takes the one in or beside each model"
    )
    max_models_gb: float | None = Field(
        None,
        gt=0,
        description="memory on the device that the weights of all models may take; those not in use leave it for "
        "others. Without it all stay",
    )
    offload: Offload | Literal["auto"] = Field(
        "auto",
        description="what waits in the CPU's memory until it is used: none, model for all but the transformer, or "
        "layer for its layers too; auto is none, or what gpu_memory asks for. On a CPU nothing does",
    )
    quantization: Quantization | Literal["auto"] = Field(
        "auto",
        description="none, int8 or fp8: weights of one byte, half the memory of 16 bits; needs torchao; auto is none, "
        "or int8 where gpu_memory is given on a card that asks for it, and torchao is there",
    )
    compile: bool = Field(
        True, description="on a GPU, run the transformer's layers by one compiled function, made at the first step"
    )
    max_duration_s: int = Field(
        int(DURATION_RANGE_S[1]), ge=10, le=int(DURATION_RANGE_S[1]), description="longest song, in seconds"
    )
    max_batch: int = Field(8, ge=1, description="songs computed in one step; the others wait for a later one")
    max_tokens: int = Field(
        7_500, ge=1, description="computed in one step, two latent frames each; a single song may take more"
    )
    max_songs_gb: float = Field(
        4.0, gt=0, description="memory on the device that the songs under way of all models may take; others wait"
    )
    max_kept_gb: float = Field(
        1.0, gt=0, description="memory on the host that songs that were made may take, to have their lyrics aligned"
    )
    adapter_dir: Path | None = Field(
        None, description="directory that adapters are loaded from; without it none can be loaded"
    )
    max_adapters: int = Field(16, ge=1, description="adapters loaded at once")
    max_adapters_gb: float = Field(4.0, gt=0, description="memory on the device that all adapters may take")
