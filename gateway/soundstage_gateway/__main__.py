"""`python -m soundstage_gateway`: the gateway process."""

from pathlib import Path
from tempfile import TemporaryDirectory

from soundstage_gateway.assets import Assets
from soundstage_gateway.servicer import offer, warm_up
from soundstage_gateway.settings import GatewaySettings
from soundstage_gateway.stages import Stages, Targets
from soundstage_gateway.store import Store
from soundstage_gateway.studio import Studio
from soundstage_gateway.tape import Tapes
from soundstage_runtime.admission import Admission
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve


async def main(settings: GatewaySettings) -> None:
    """Serve until SIGTERM."""
    stages = Stages(Targets(lm=settings.lm, dit=settings.dit, vae=settings.vae))
    songs = Admission("songs", limit=settings.max_songs)
    listeners = Admission("listeners", limit=settings.max_listeners)
    uploads = Admission("uploads", limit=settings.max_uploads)
    assets = Assets(settings.asset_cache_mb << 20)
    with TemporaryDirectory(prefix="soundstage-") as scratch:
        folder = settings.data_dir or Path(scratch)
        store = Store(folder, limit_bytes=settings.song_store_mb << 20)
        tapes = Tapes(Path(scratch) / "tapes", limit_bytes=settings.tape_cache_mb << 20)
        studio = Studio(stages, songs, assets, store, tapes, keep_s=settings.keep_h * 3600)
        await studio.open()
        services = offer(
            studio,
            stages,
            assets,
            songs=songs,
            listeners=listeners,
            uploads=uploads,
            stall_timeout_s=settings.stall_timeout_s,
        )
        try:
            await serve(settings, services, warm_up=warm_up)
        finally:
            await studio.close()
            await stages.close()


if __name__ == "__main__":
    run("gateway", GatewaySettings, main)
