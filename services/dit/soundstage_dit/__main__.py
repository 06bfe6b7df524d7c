"""`python -m soundstage_dit --model DIR`: the diffusion process."""

import os
from functools import partial
from typing import Final

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_budget.installed import find_installed
from soundstage_device.budget import free_bytes, pin_budget, read_budget
from soundstage_device.device import choose_device, choose_dtype, describe_card, dtype_name
from soundstage_device.worker import DeviceWorker, loading
from soundstage_dit.adapters import Adapters
from soundstage_dit.engine import DitEngine
from soundstage_dit.models import find, load_models
from soundstage_dit.servicer import offer, warm_up
from soundstage_dit.settings import DitSettings
from soundstage_dit.size import fit, read_size
from soundstage_runtime.admission import Admission
from soundstage_runtime.process import run
from soundstage_runtime.serve import serve

_REMEDIES: Final = "more gpu_memory would do, or offload model or layer, or quantization int8"


async def main(settings: DitSettings) -> None:
    """Load, and serve until SIGTERM."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    budget_bytes = read_budget(settings.gpu_memory, device, settings.max_cuda_vram)
    pin_budget(budget_bytes, device)
    if budget_bytes is not None:
        sizes = [read_size(*find(settings, name)) for name in settings.model]
        settings = fit(
            settings,
            sizes,
            budget_bytes,
            dtype=dtype_name(dtype),
            card=describe_card(device, settings.max_cuda_vram),
            has_torchao=find_installed().has_torchao,
        )
        # Else a CPU's memory fills with kernels: songs have any length, and each is made for one.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    worker = DeviceWorker("dit")
    with loading(_REMEDIES):
        models, residence = await worker.run(load_models, settings, device, dtype)
    cards = [
        StageModel(
            name=model.name,
            variant=model.variant,
            model_fingerprint=model.model_fingerprint,
            dtype=dtype_name(dtype),
        )
        for model in models
    ]
    # Songs wait in the engine, which knows how long for.
    admission = Admission("songs", limit=settings.max_in_flight + settings.max_waiting)
    adapters = Adapters(
        models,
        worker,
        folder=settings.adapter_dir,
        max_count=settings.max_adapters,
        max_bytes=round(settings.max_adapters_gb * 1e9),
    )
    engine = DitEngine(
        models,
        worker,
        adapters=adapters,
        residence=residence,
        free_bytes=partial(free_bytes, device, budget_bytes),
        max_batch=settings.max_batch,
        max_tokens=settings.max_tokens,
        max_songs=settings.max_in_flight,
        max_songs_gb=settings.max_songs_gb,
        max_waiting=settings.max_waiting,
    )
    services = offer(
        engine,
        adapters,
        models=cards,
        device=str(device),
        admission=admission,
        max_duration_s=settings.max_duration_s,
        max_kept_bytes=round(settings.max_kept_gb * 1e9),
    )
    await serve(settings, services, warm_up=partial(warm_up, models=cards))
    engine.close()


if __name__ == "__main__":
    run("dit", DitSettings, main)
