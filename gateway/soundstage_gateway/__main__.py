"""`python -m soundstage_gateway`: the gateway process."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

from soundstage_gateway.assets import Assets
from soundstage_gateway.http.app import Api
from soundstage_gateway.http.door import HttpDoor
from soundstage_gateway.http.names import Names
from soundstage_gateway.keys import Keys
from soundstage_gateway.metrics import Metrics
from soundstage_gateway.servicer import offer, warm_up
from soundstage_gateway.settings import GatewaySettings
from soundstage_gateway.shelf import Shelf
from soundstage_gateway.stages import Stages, Targets
from soundstage_gateway.store import Store
from soundstage_gateway.studio import Studio
from soundstage_gateway.tape import Tapes
from soundstage_runtime.admission import Admission
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve

_log = structlog.get_logger()


async def main(settings: GatewaySettings) -> None:
    """Serve until SIGTERM."""
    stages = Stages(Targets(lm=settings.lm, dit=settings.dit, vae=settings.vae))
    songs = Admission("songs", limit=settings.max_songs)
    listeners = Admission("listeners", limit=settings.max_listeners)
    watchers = Admission("watchers", limit=settings.max_watchers)
    uploads = Admission("uploads", limit=settings.max_uploads)
    metrics = Metrics([songs, listeners, watchers, uploads])
    keys = Keys(settings.keys_file) if settings.keys_file else None
    if keys is None:
        _log.info("keys_off", note="whoever reaches the port may use it; --keys-file changes that")
    assets = Assets(settings.asset_cache_mb << 20)
    with TemporaryDirectory(prefix="soundstage-") as scratch:
        folder = settings.data_dir or Path(scratch)
        store = Store(folder, limit_bytes=settings.song_store_mb << 20)
        tapes = Tapes(Path(scratch) / "tapes", limit_bytes=settings.tape_cache_mb << 20)
        shelf = Shelf(Path(scratch) / "shelf", limit_bytes=settings.file_cache_mb << 20)
        studio = Studio(stages, songs, assets, store, tapes, shelf, metrics, keep_s=settings.keep_h * 3600)
        await studio.open()
        offered = offer(
            studio,
            stages,
            assets,
            metrics,
            songs=songs,
            listeners=listeners,
            watchers=watchers,
            uploads=uploads,
            stall_timeout_s=settings.stall_timeout_s,
        )
        names = Names(settings.host, [name.strip() for name in settings.http_names.split(",") if name.strip()])
        api = Api(offered, studio, shelf, keys, metrics, stall_timeout_s=settings.stall_timeout_s, names=names)
        try:
            await serve(
                settings,
                offered.services(),
                warm_up=partial(warm_up, key=keys.own if keys else ""),
                check=keys.check if keys else None,
                observe=metrics.count_call,
                door=HttpDoor(api, host=settings.host, port=settings.http_port),
            )
        finally:
            await api.close()
            await studio.close()
            await stages.close()


if __name__ == "__main__":
    run("gateway", GatewaySettings, main)
