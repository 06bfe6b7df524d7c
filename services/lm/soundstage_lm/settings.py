"""Settings of the planner process: flags, or environment variables that begin with SOUNDSTAGE_LM_."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_budget.engine_choice import AskedEngine
from soundstage_runtime.score import DURATION_RANGE_S
from soundstage_runtime.settings import StageSettings


class LmSettings(StageSettings):
    """The planner. Every flag is also an environment variable: --model is SOUNDSTAGE_LM_MODEL."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_LM_")

    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    max_duration_s: int = Field(
        int(DURATION_RANGE_S[1]), ge=10, le=int(DURATION_RANGE_S[1]), description="longest song, in seconds"
    )
    engine: AskedEngine = Field("auto", description="auto, torch or vllm; auto is vllm on a card it knows, else torch")
    kv_cache_gb: float = Field(
        4.0,
        gt=0,
        description="memory for the keys and values of all songs, in GB; "
        "with gpu_memory what is planned, if none is given",
    )
    engine_timeout_s: float = Field(600.0, gt=0, description="seconds that vllm may take to start, else torch is used")
