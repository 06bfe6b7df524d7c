"""Settings of the gateway."""

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from soundstage_runtime.settings import ServerSettings


class GatewaySettings(ServerSettings):
    """The gateway. Every flag is also an environment variable: --max-songs is SOUNDSTAGE_GATEWAY_MAX_SONGS."""

    model_config = SettingsConfigDict(env_prefix="SOUNDSTAGE_GATEWAY_")

    port: int = Field(50050, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    lm: str = Field("127.0.0.1:50051", description="gRPC target of the language model stage")
    dit: str = Field("127.0.0.1:50052", description="gRPC target of the diffusion stage")
    vae: str = Field("127.0.0.1:50053", description="gRPC target of the decoder stage")
    max_songs: int = Field(16, ge=1, description="variants made at once; more are refused")
    asset_cache_mb: int = Field(512, ge=256, description="megabytes of uploaded audio to keep, 23 for every minute")
    max_uploads: int = Field(8, ge=1, description="files taken in at once; more are refused")
    stall_timeout_s: float = Field(60.0, gt=0, description="seconds a client may take nothing before its call is ended")
