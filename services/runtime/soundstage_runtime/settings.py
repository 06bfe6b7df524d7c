"""Settings of a process: environment variables and flags, read once, checked whole."""

import sys
from collections.abc import Sequence
from typing import TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings

from soundstage_runtime.logs import LogFormat, LogLevel


class ServerSettings(BaseSettings):
    """What every process has. A subclass sets `env_prefix` in its model_config."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    log_format: LogFormat = Field("console", description="console or json")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")
    drain_s: float = Field(0.0, ge=0, description="seconds between NOT_SERVING and refusing calls, on SIGTERM")
    grace_s: float = Field(30.0, ge=0, description="seconds that calls in flight are given to end, on SIGTERM")


S = TypeVar("S", bound=ServerSettings)


def load_settings(settings: type[S], arguments: Sequence[str] | None = None) -> S:
    """Read flags (`--port`), then the environment, then defaults; exit with status 2 naming every bad value."""
    prefix = settings.model_config.get("env_prefix", "")
    try:
        return settings(
            _cli_parse_args=list(sys.argv[1:] if arguments is None else arguments),  # type: ignore[call-arg]
            _cli_prog_name=f"python -m {settings.__module__.partition('.')[0]}",  # type: ignore[call-arg]
            _cli_kebab_case=True,  # type: ignore[call-arg]
            _cli_implicit_flags=True,  # type: ignore[call-arg]
        )
    except ValidationError as error:
        for bad in error.errors():
            field = str(bad["loc"][0]) if bad["loc"] else "settings"
            held = "is not set" if bad["type"] == "missing" else f"is {bad['input']!r}"
            flag = "--" + field.replace("_", "-")
            print(f"{prefix}{field.upper()} (or {flag}) {held}: {bad['msg']}", file=sys.stderr)
        sys.exit(2)
