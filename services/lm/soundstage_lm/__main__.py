"""`python -m soundstage_lm --model DIR`: the planner process."""

from soundstage_device.worker import DeviceWorker
from soundstage_lm.engine import load_composer
from soundstage_lm.servicer import offer, warm_up
from soundstage_lm.settings import LmSettings
from soundstage_runtime.admission import Admission
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve


async def main(settings: LmSettings) -> None:
    """Load, and serve until SIGTERM."""
    loaded = await load_composer(settings, DeviceWorker("lm"))
    settings = loaded.settings
    services = offer(
        loaded.composer,
        model=loaded.model,
        device=loaded.device,
        admission=Admission("songs", limit=settings.max_in_flight, max_waiting=settings.max_waiting),
        max_duration_s=settings.max_duration_s,
    )
    try:
        await serve(settings, services, warm_up=warm_up, lost=loaded.lost)
    finally:
        loaded.close()


if __name__ == "__main__":
    run("lm", LmSettings, main)
