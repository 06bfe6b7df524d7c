"""`python -m soundstage_vae --model DIR`: the codec process."""

from functools import partial
from pathlib import Path

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_device.device import choose_device, choose_dtype, dtype_name
from soundstage_runtime.admission import Admission
from soundstage_runtime.checkpoint import locate
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine
from soundstage_vae.servicer import offer, warm_up
from soundstage_vae.settings import VaeSettings
from soundstage_vae.tiling import window_lengths


async def main(settings: VaeSettings) -> None:
    """Load, and serve until SIGTERM."""
    device = choose_device(settings.device)
    # bfloat16 has fewer bits than 16-bit audio, so it is never chosen unasked.
    dtype = choose_dtype("float32" if settings.dtype == "auto" else settings.dtype, device)
    worker = Worker("vae")
    codec = await worker.run(Codec, locate(settings.model), device=device, dtype=dtype)
    model = StageModel(
        name=Path(settings.model).name,
        variant="oobleck",
        model_fingerprint=codec.fingerprint,
        dtype=dtype_name(dtype),
    )
    admission = Admission("VAE calls", limit=settings.max_in_flight, max_waiting=settings.max_waiting)
    windows = window_lengths(settings.first_window_frames, settings.window_frames)
    engine = VaeEngine(codec, worker, windows=windows)
    services = offer(engine, model=model, device=str(device), admission=admission)
    await serve(settings, services, warm_up=partial(warm_up, latent_frames=sum(windows)))
    engine.close()


if __name__ == "__main__":
    run("vae", VaeSettings, main)
