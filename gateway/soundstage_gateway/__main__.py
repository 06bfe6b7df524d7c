"""`python -m soundstage_gateway`: the gateway process."""

from soundstage_gateway.assets import Assets
from soundstage_gateway.servicer import offer, warm_up
from soundstage_gateway.settings import GatewaySettings
from soundstage_gateway.stages import Stages, Targets
from soundstage_runtime.admission import Admission
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve


async def main(settings: GatewaySettings) -> None:
    """Serve until SIGTERM."""
    stages = Stages(Targets(lm=settings.lm, dit=settings.dit, vae=settings.vae))
    admission = Admission("songs", limit=settings.max_songs)
    assets = Assets(settings.asset_cache_mb << 20)
    uploads = Admission("uploads", limit=settings.max_uploads)
    services = offer(stages, admission, assets, uploads, stall_timeout_s=settings.stall_timeout_s)
    try:
        await serve(settings, services, warm_up=warm_up)
    finally:
        await stages.close()


if __name__ == "__main__":
    run("gateway", GatewaySettings, main)
