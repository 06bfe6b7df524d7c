"""Run the diffusion service: `python -m soundstage_dit --model DIR`."""

import asyncio
import sys

from soundstage.stage.v1.dit_service_pb2_grpc import add_DitServiceServicer_to_server
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.stage.v1.stage_service_pb2_grpc import add_StageServiceServicer_to_server
from soundstage_device.device import choose_device, choose_dtype, dtype_name
from soundstage_dit.engine import DitEngine
from soundstage_dit.servicer import DitServicer, warm_up
from soundstage_dit.settings import DitSettings
from soundstage_dit.weights import load
from soundstage_runtime.admission import Admission
from soundstage_runtime.checkpoint import CheckpointError, locate
from soundstage_runtime.logs import configure
from soundstage_runtime.serve import PortTakenError, Service, serve
from soundstage_runtime.settings import load_settings
from soundstage_runtime.stage import StageServicer


def main() -> None:
    """Load, serve, and leave with status 1 and one line when the checkpoint or the port is not to be had."""
    settings = load_settings(DitSettings)
    configure("dit", log_format=settings.log_format, log_level=settings.log_level)
    try:
        run(settings)
    except (CheckpointError, PortTakenError) as error:
        sys.exit(f"soundstage_dit: {error}")


def run(settings: DitSettings) -> None:
    """Serve until SIGTERM."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    text_encoder = locate(settings.text_encoder) if settings.text_encoder else None
    loaded = load(locate(settings.model), text_encoder=text_encoder, device=device, dtype=dtype)
    engine = DitEngine(loaded, max_batch=settings.max_batch)
    admission = Admission("songs", limit=settings.max_in_flight)
    model = StageModel(
        name=settings.model,
        variant=loaded.variant,
        model_fingerprint=loaded.model_fingerprint,
        dtype=dtype_name(dtype),
    )
    dit = DitServicer(engine, admission)
    stage = StageServicer("dit", models=[model], device=str(device), admission=admission)
    services = [
        Service(
            name="soundstage.stage.v1.DitService", add=lambda server: add_DitServiceServicer_to_server(dit, server)
        ),
        Service(
            name="soundstage.stage.v1.StageService",
            add=lambda server: add_StageServiceServicer_to_server(stage, server),
        ),
    ]
    asyncio.run(serve(settings, services, warm_up=warm_up))
    engine.close()


if __name__ == "__main__":
    main()
