"""All models of a process, loaded as its settings say."""

from pathlib import Path

import torch
from transformers import Qwen3Model

from soundstage_device.linear import pack_linears
from soundstage_dit.quantization import quantize
from soundstage_dit.residence import Residence, check_size, move_to
from soundstage_dit.settings import DitSettings
from soundstage_dit.weights import LoadedModel, load, text_encoder_beside
from soundstage_runtime.checkpoint import locate
from soundstage_runtime.errors import StartError

_CPU = torch.device("cpu")


class SameModelError(StartError):
    """Two models cannot be told apart."""


def load_models(
    settings: DitSettings, device: torch.device, dtype: torch.dtype
) -> tuple[list[LoadedModel], Residence | None]:
    """Load the models, and a residence for them where the device may not hold all at once.

    To be called on the thread that runs them. Raises StartErrors: what `load` and `quantize` raise, SameModelError, and
    ModelTooLargeError, before anything of the model is on the device.
    """
    max_bytes = None if settings.max_models_gb is None else round(settings.max_models_gb * 1e9)
    text_encoders: dict[str, Qwen3Model] = {}
    models: list[LoadedModel] = []
    for name in settings.model:
        beside = settings.text_encoder or text_encoder_beside(name)
        model = load(
            locate(name),
            text_encoder=locate(beside) if beside else None,
            device=device,
            dtype=dtype,
            name=Path(name).name,
            home=device if max_bytes is None else _CPU,
            text_encoders=text_encoders,
        )
        _check_apart(model, models)
        quantize(model.dit, settings.quantization)
        models.append(model)
    if settings.compile and device.type == "cuda":
        for model in models:
            model.dit.compile_layers()
    if max_bytes is not None and device != _CPU:
        residence = Residence(models, max_bytes=max_bytes, take=move_to(device), send=move_to(_CPU))
        return models, residence
    if max_bytes is not None:
        check_size(models, max_bytes)  # from a CPU's memory there is nowhere to go
    for model in models:
        pack_linears(model.dit)
    return models, None


def _check_apart(model: LoadedModel, others: list[LoadedModel]) -> None:
    for other in others:
        if model.name == other.name:
            raise SameModelError(f"two models are called {model.name}; rename the directory of one")
        if model.model_fingerprint == other.model_fingerprint:
            raise SameModelError(f"{other.name} and {model.name} are the same model; leave one out")
