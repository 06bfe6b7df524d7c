"""Settings of the codec process: flags, or environment variables that begin with SOUNDSTAGE_VAE_."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_runtime.settings import StageSettings


class VaeSettings(StageSettings):
    """The codec. Every flag is also an environment variable: --model is SOUNDSTAGE_VAE_MODEL."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_VAE_")

    port: int = Field(50053, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    max_in_flight: int = Field(64, ge=1, description="calls worked on at once: the scheduler chooses among their tiles")
    first_window_frames: int = Field(
        32, ge=32, le=2048, description="latent frames of a song's first window; later ones double up to window_frames"
    )
    window_frames: Literal["auto"] | Annotated[int, Field(ge=32, le=2048)] = Field(
        "auto",
        description="latent frames computed at once: more cost less in all; auto is 64 on a CPU, else what fits, up to "
        "1536",
    )
    max_batch_tiles: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] = Field(
        "auto", description="tiles of several songs computed at once, where it is exact; auto is 1 on a CPU, else 4"
    )
    offload: Literal["auto", "none", "model"] = Field(
        "auto",
        description="what waits in the CPU's memory until it is used: none, or model for both halves, one on the card "
        "at a time; auto is none, or what gpu_memory asks for. On a CPU nothing does",
    )
    last_layers_fp32: bool = Field(
        False, description="let the decoder's last layers work in float32 whatever the dtype"
    )
    compile: bool = Field(
        True, description="on a GPU, run what is between the convolutions by one compiled function, made at the start"
    )
