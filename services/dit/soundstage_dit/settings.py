"""Settings of the diffusion process: flags, or environment variables that begin with SOUNDSTAGE_DIT_."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_runtime.settings import StageSettings

Quantization = Literal["none", "int8", "fp8"]


class DitSettings(StageSettings):
    """The diffusion stage. Every flag is also an environment variable: --model is SOUNDSTAGE_DIT_MODEL."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_DIT_")

    port: int = Field(50052, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    text_encoder: str = Field(
        "", description="directory or hub id of the text encoder; empty takes the one in or beside the model"
    )
    quantization: Quantization = Field(
        "none", description="none, int8 or fp8: weights of one byte, half the memory of 16 bits; needs torchao"
    )
    max_batch: int = Field(8, ge=1, description="songs computed in one step; the others wait for a later one")
    max_tokens: int = Field(
        7_500, ge=1, description="computed in one step, two latent frames each; a single song may take more"
    )
    max_songs_gb: float = Field(
        4.0, gt=0, description="memory on the device that all songs under way may take, by estimate; others wait"
    )
    adapter_dir: Path | None = Field(
        None, description="directory that adapters are loaded from; without it none can be loaded"
    )
    max_adapters: int = Field(16, ge=1, description="adapters loaded at once")
    max_adapters_gb: float = Field(4.0, gt=0, description="memory on the device that all adapters may take")
