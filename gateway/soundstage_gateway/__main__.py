"""`python -m soundstage_gateway`: the gateway process."""

import asyncio

from soundstage_gateway.servicer import offer, warm_up
from soundstage_gateway.settings import GatewaySettings
from soundstage_gateway.stages import Stages, Targets
from soundstage_runtime import logs
from soundstage_runtime.admission import Admission
from soundstage_runtime.serve import serve
from soundstage_runtime.settings import load_settings


async def main() -> None:
    settings = load_settings(GatewaySettings)
    logs.configure("gateway", log_format=settings.log_format, log_level=settings.log_level)
    stages = Stages(Targets(lm=settings.lm, dit=settings.dit, vae=settings.vae))
    try:
        await serve(settings, offer(stages, Admission("songs", limit=settings.max_songs)), warm_up=warm_up)
    finally:
        await stages.close()


if __name__ == "__main__":
    asyncio.run(main())
