"""The outermost frame of a process: settings in, logs on, one line and status 1 for what a user can mend."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from soundstage_runtime import logs
from soundstage_runtime.errors import StartError
from soundstage_runtime.settings import ServerSettings, load_settings

S = TypeVar("S", bound=ServerSettings)


def run(name: str, settings_type: type[S], main: Callable[[S], Coroutine[Any, Any, None]]) -> None:
    """Run a process called `name` until `main` ends."""
    settings = load_settings(settings_type)
    logs.configure(name, log_format=settings.log_format, log_level=settings.log_level)
    try:
        asyncio.run(main(settings))
    except StartError as error:
        sys.exit(f"soundstage_{name}: {error}")
