"""Run the VAE service: `python -m soundstage_vae --model DIR`."""

import asyncio
import sys

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage.stage.v1.stage_service_pb2_grpc import add_StageServiceServicer_to_server
from soundstage.stage.v1.vae_service_pb2_grpc import add_VaeServiceServicer_to_server
from soundstage_device.device import choose_device, choose_dtype, dtype_name
from soundstage_runtime.admission import Admission
from soundstage_runtime.checkpoint import CheckpointError, locate
from soundstage_runtime.logs import configure
from soundstage_runtime.serve import PortTakenError, Service, serve
from soundstage_runtime.settings import load_settings
from soundstage_runtime.stage import StageServicer
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine
from soundstage_vae.servicer import VaeServicer, warm_up
from soundstage_vae.settings import VaeSettings


def main() -> None:
    """Load, serve, and leave with status 1 and one line when the checkpoint or the port is not to be had."""
    settings = load_settings(VaeSettings)
    configure("vae", log_format=settings.log_format, log_level=settings.log_level)
    try:
        run(settings)
    except (CheckpointError, PortTakenError) as error:
        sys.exit(f"soundstage_vae: {error}")


def run(settings: VaeSettings) -> None:
    """Serve until SIGTERM."""
    device = choose_device(settings.device)
    dtype = choose_dtype("float32" if settings.dtype == "auto" else settings.dtype, device)
    codec = Codec(locate(settings.model), device=device, dtype=dtype)
    engine = VaeEngine(codec, window_frames=settings.window_frames)
    admission = Admission("VAE calls", limit=settings.max_in_flight)
    model = StageModel(
        name=settings.model, variant="oobleck", model_fingerprint=codec.fingerprint, dtype=dtype_name(dtype)
    )
    vae = VaeServicer(engine, admission)
    stage = StageServicer("vae", models=[model], device=str(device), admission=admission)
    services = [
        Service(
            name="soundstage.stage.v1.VaeService", add=lambda server: add_VaeServiceServicer_to_server(vae, server)
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
