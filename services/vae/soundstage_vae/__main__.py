"""`python -m soundstage_vae --model DIR`: the codec process."""

from functools import partial
from pathlib import Path
from typing import Final

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_budget.engine_choice import can_compile
from soundstage_budget.models import BYTES, VaeModel
from soundstage_budget.need import tile_bytes
from soundstage_device.budget import pin_budget, read_budget
from soundstage_device.device import choose_device, choose_dtype, describe_card, dtype_name
from soundstage_device.worker import DeviceWorker, loading
from soundstage_runtime.admission import Admission
from soundstage_runtime.checkpoint import locate
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve
from soundstage_vae.batching import choose_batches
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine
from soundstage_vae.memory import choose_window
from soundstage_vae.servicer import offer, warm_up
from soundstage_vae.settings import VaeSettings
from soundstage_vae.size import fit, read_size
from soundstage_vae.tiling import window_lengths

_REMEDIES: Final = "more gpu_memory would do, or offload model, or a smaller window_frames"
_CPU_WINDOW: Final = 64
_CPU_BATCH: Final = 1
_CUDA_BATCH: Final = 4


async def main(settings: VaeSettings) -> None:
    """Load, and serve until SIGTERM."""
    device = choose_device(settings.device)
    # bfloat16 has fewer bits than 16-bit audio, so it is never chosen unasked.
    dtype = choose_dtype("float32" if settings.dtype == "auto" else settings.dtype, device)
    folder = locate(settings.model)
    size, card = read_size(folder), describe_card(device, settings.max_cuda_vram)
    budget_bytes = read_budget(settings.gpu_memory, device, settings.max_cuda_vram)
    pin_budget(budget_bytes, device)
    if budget_bytes is not None:
        settings = fit(settings, size, budget_bytes, dtype=dtype_name(dtype), card=card)
    worker = DeviceWorker("vae")
    with loading(_REMEDIES):
        codec = await worker.run(
            Codec,
            folder,
            device=device,
            dtype=dtype,
            last_layers_fp32=settings.last_layers_fp32,
            is_offloaded=settings.offload == "model" and device.type != "cpu",
        )
        if settings.compile and can_compile(card):
            await worker.run(codec.compile_snakes)
        batches = await worker.run(plan, codec, size, settings)
    model = StageModel(
        name=Path(settings.model).name,
        variant="oobleck",
        model_fingerprint=codec.fingerprint,
        dtype=dtype_name(dtype),
    )
    admission = Admission("VAE calls", limit=settings.max_in_flight, max_waiting=settings.max_waiting)
    engine = VaeEngine(codec, worker, windows=tuple(batches), batches=batches)
    services = offer(engine, model=model, device=str(device), admission=admission)
    await serve(settings, services, warm_up=partial(warm_up, latent_frames=sum(batches)))
    engine.close()


def plan(codec: Codec, size: VaeModel, settings: VaeSettings) -> dict[int, int]:
    """Choose the lengths of windows, in order, and how many of each are decoded at once."""
    is_cpu = codec.device.type == "cpu"
    max_batch, largest = settings.max_batch_tiles, settings.window_frames
    if max_batch == "auto":
        max_batch = _CPU_BATCH if is_cpu else _CUDA_BATCH
    if largest == "auto":
        bytes_of = partial(
            tile_bytes, size, tiles=max_batch, itemsize=BYTES[dtype_name(codec.dtype)], on_card=not is_cpu
        )
        largest = _CPU_WINDOW if is_cpu else choose_window(codec.free_bytes(), bytes_of)
    return choose_batches(codec, window_lengths(settings.first_window_frames, largest), max_batch)


if __name__ == "__main__":
    run("vae", VaeSettings, main)
