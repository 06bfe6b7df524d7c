"""`python -m soundstage_dit --model DIR`: the diffusion process."""

from pathlib import Path

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_device.device import choose_device, choose_dtype, dtype_name
from soundstage_device.linear import pack_linears
from soundstage_dit.adapters import Adapters
from soundstage_dit.engine import DitEngine
from soundstage_dit.quantization import quantize
from soundstage_dit.servicer import offer, warm_up
from soundstage_dit.settings import DitSettings
from soundstage_dit.weights import load, text_encoder_beside
from soundstage_runtime.admission import Admission
from soundstage_runtime.checkpoint import locate
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve
from soundstage_runtime.worker import Worker


async def main(settings: DitSettings) -> None:
    """Load, and serve until SIGTERM."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    folder = locate(settings.model)
    beside = settings.text_encoder or text_encoder_beside(settings.model)
    text_encoder = locate(beside) if beside else None
    worker = Worker("dit")
    loaded = await worker.run(load, folder, text_encoder=text_encoder, device=device, dtype=dtype)
    await worker.run(quantize, loaded.dit, settings.quantization)
    await worker.run(pack_linears, loaded.dit)
    model = StageModel(
        name=Path(settings.model).name,
        variant=loaded.variant,
        model_fingerprint=loaded.model_fingerprint,
        dtype=dtype_name(dtype),
    )
    # Songs wait in the engine, which knows how long for.
    admission = Admission("songs", limit=settings.max_in_flight + settings.max_waiting)
    adapters = Adapters(
        loaded.dit,
        worker,
        folder=settings.adapter_dir,
        max_count=settings.max_adapters,
        max_bytes=round(settings.max_adapters_gb * 1e9),
    )
    engine = DitEngine(
        loaded,
        worker,
        adapters=adapters,
        max_batch=settings.max_batch,
        max_tokens=settings.max_tokens,
        max_songs=settings.max_in_flight,
        max_songs_gb=settings.max_songs_gb,
        max_waiting=settings.max_waiting,
    )
    services = offer(engine, adapters, model=model, device=str(device), admission=admission)
    await serve(settings, services, warm_up=warm_up)
    engine.close()


if __name__ == "__main__":
    run("dit", DitSettings, main)
