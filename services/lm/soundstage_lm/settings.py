"""Settings of the planner process: flags, or environment variables that begin with SOUNDSTAGE_LM_."""

from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_runtime.score import DURATION_RANGE_S
from soundstage_runtime.settings import ServerSettings


class LmSettings(ServerSettings):
    """Which planner to serve, where, and how much of it at once."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_LM_")

    model: str = Field(description="directory or hub id (owner/name[/folder]) of the checkpoint")
    device: str = Field("auto", description='"auto", "cpu" or "cuda:0"')
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic type; auto is bfloat16 where the device has it, else float32"
    )
    max_in_flight: int = Field(4, ge=1, description="songs planned at once; more are refused")
    max_duration_s: int = Field(
        int(DURATION_RANGE_S[1]), ge=10, le=int(DURATION_RANGE_S[1]), description="longest song, in seconds"
    )
