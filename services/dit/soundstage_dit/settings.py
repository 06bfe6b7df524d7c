"""The diffusion process's settings."""

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_runtime.settings import ServerSettings


class DitSettings(ServerSettings):
    """Read from SOUNDSTAGE_DIT_* and flags."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_DIT_")

    model: str = Field(
        description="directory, of the original or diffusers' layout, or hub id: ACE-Step/Ace-Step1.5/acestep-v15-turbo"
    )
    text_encoder: str = Field(
        "", description="directory or hub id of the text encoder; empty takes the one in or beside the model"
    )
    device: str = Field("auto", description="auto, cpu, cuda:0; auto is the first CUDA device, or the CPU")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="arithmetic type; auto is float32 on a CPU and half precision on a GPU"
    )
    max_in_flight: int = Field(16, ge=1, description="songs admitted at once; one more is refused")
    max_batch: int = Field(4, ge=1, description="songs computed in one step; the others wait for a place")
