"""Settings of the gateway."""

from pathlib import Path

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
    max_listeners: int = Field(256, ge=1, description="streams of audio at once; more are refused")
    max_watchers: int = Field(1024, ge=1, description="streams of a song's events at once; more are refused")
    data_dir: Path | None = Field(
        None, description="folder to keep songs in; without one they are gone when the process ends"
    )
    keep_h: float = Field(24.0, gt=0, description="hours to keep a song")
    song_store_mb: int = Field(2048, ge=16, description="megabytes of songs to keep; the oldest go first")
    tape_cache_mb: int = Field(4096, ge=16, description="megabytes of decoded audio to keep, 23 for every minute")
    file_cache_mb: int = Field(1024, ge=16, description="megabytes of encoded audio to keep for players")
    http_port: int = Field(50080, ge=0, le=65535, description="port for players; 0 takes a free one and logs it")
    http_names: str = Field(
        "", description="names, with commas between, that a proxy or a hosts file gives the HTTP port"
    )
    keys_file: Path | None = Field(None, description="file of keys, one a line; without one everybody may come in")
    stall_timeout_s: float = Field(60.0, gt=0, description="seconds a client may take nothing before its call is ended")
