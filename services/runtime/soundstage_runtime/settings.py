"""Settings of a process: environment variables and flags, read once, checked whole."""

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings

from soundstage_runtime.logs import LogFormat, LogLevel
from soundstage_runtime.memory import parse_memory, parse_vram


def _check_memory(text: str) -> str:
    if text:
        parse_memory(text)
    return text


def _read_vram(value: object) -> object:
    return parse_vram(value) if isinstance(value, str) else value


class ServerSettings(BaseSettings):
    """What every process has. A subclass sets `env_prefix` in its model_config."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(0, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")
    log_format: LogFormat = Field("console", description="console or json")
    log_level: LogLevel = Field("info", description="debug, info, warning or error")
    drain_s: float = Field(0.0, ge=0, description="seconds between NOT_SERVING and refusing calls, on SIGTERM")
    grace_s: float = Field(30.0, ge=0, description="seconds that calls in flight are given to end, on SIGTERM")


class StageSettings(ServerSettings):
    """What every stage has: a model, where it runs, and how much of it at once."""

    model: str = Field(description="checkpoint: a directory, or a hub id owner/name[/folder]")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu or cuda:0; auto is the first card that torch has kernels for, or the CPU",
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="arithmetic type")
    gpu_memory: Annotated[str, AfterValidator(_check_memory)] = Field(
        "", description="memory to stay within: a size as 6GiB, or a fraction of the device; empty for no limit"
    )
    max_cuda_vram: Annotated[float | None, BeforeValidator(_read_vram)] = Field(
        None,
        validation_alias="MAX_CUDA_VRAM",
        description="GB that the card has at most, as if it were a smaller one; empty for all of it",
    )
    max_in_flight: int = Field(8, ge=1, description="calls worked on at once")
    max_waiting: int = Field(64, ge=0, description="calls that may wait their turn; more are refused")

    def asked(self, name: str) -> Any:
        """Return a setting that somebody chose, and None for one that is left at its default."""
        return getattr(self, name) if name in self.model_fields_set else None


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
            # One with an alias is called that, whatever the process.
            has_alias = any(known.validation_alias == field for known in settings.model_fields.values())
            variable = field if has_alias else prefix + field.upper()
            flag = "--" + field.lower().replace("_", "-")
            print(f"{variable} (or {flag}) {held}: {bad['msg']}", file=sys.stderr)
        sys.exit(2)
