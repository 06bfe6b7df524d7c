"""Serve a planner: `python -m soundstage_lm --model DIR --port 0`."""

import asyncio
import sys

from soundstage_lm.engine import describe, load_composer
from soundstage_lm.servicer import make_services, warm_up
from soundstage_lm.settings import LmSettings
from soundstage_runtime import logs
from soundstage_runtime.checkpoint import CheckpointError
from soundstage_runtime.serve import serve
from soundstage_runtime.settings import load_settings
from soundstage_runtime.worker import Worker


def main() -> None:
    settings = load_settings(LmSettings)
    logs.configure("lm", log_format=settings.log_format, log_level=settings.log_level)
    worker = Worker("lm")
    try:
        composer = load_composer(settings, worker)
    except CheckpointError as error:
        sys.exit(f"soundstage_lm: {error}")
    services = make_services(
        composer,
        model=describe(composer, settings),
        device=composer.device,
        limit=settings.max_in_flight,
        max_duration_s=settings.max_duration_s,
    )
    asyncio.run(serve(settings, services, warm_up=warm_up))


if __name__ == "__main__":
    main()
