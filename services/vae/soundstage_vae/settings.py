"""The VAE process's settings."""

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_runtime.settings import ServerSettings


class VaeSettings(ServerSettings):
    """Read from SOUNDSTAGE_VAE_* and flags."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_VAE_")

    model: str = Field(description="directory with config.json and weights, or a hub id: ACE-Step/Ace-Step1.5/vae")
    device: str = Field("auto", description="auto, cpu, cuda:0; auto is the first CUDA device, or the CPU")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="arithmetic type; auto is float32: bfloat16 has fewer bits than 16-bit audio"
    )
    max_in_flight: int = Field(16, ge=1, description="calls admitted at once; one more is refused")
    window_frames: int = Field(
        128, ge=32, le=2048, description="latent frames computed at once; more takes more memory, about 5 MB each"
    )
