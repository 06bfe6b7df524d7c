"""All models of a process, loaded as its settings say."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3Model

from soundstage_budget.engine_choice import can_compile
from soundstage_device.device import describe_card
from soundstage_device.linear import pack_linears
from soundstage_device.offload import Piece, come_when_called
from soundstage_dit.quantization import quantize
from soundstage_dit.residence import Residence, check_size, move_to
from soundstage_dit.settings import DitSettings
from soundstage_dit.weights import LoadedModel, load, text_encoder_beside
from soundstage_runtime.checkpoint import Fingerprints, locate
from soundstage_runtime.errors import StartError

_CPU = torch.device("cpu")


class SameModelError(StartError):
    """Two models cannot be told apart."""


class OffloadError(StartError):
    """Two ways of having weights leave the device were asked for."""


def find(settings: DitSettings, name: str) -> tuple[Path, Path | None]:
    """Return the directory of a model, and of its text encoder if that is elsewhere; raises CheckpointError."""
    beside = settings.text_encoder or text_encoder_beside(name)
    return locate(name), locate(beside) if beside else None


def load_models(
    settings: DitSettings, device: torch.device, dtype: torch.dtype
) -> tuple[list[LoadedModel], Residence | None]:
    """Load the models, and a residence for them where the device may not hold all at once.

    To be called on the thread that runs them. Raises StartErrors: what `load` and `quantize` raise, SameModelError,
    OffloadError, and ModelTooLargeError, before anything of the model is on the device.
    """
    is_offloaded = settings.offload in ("model", "layer") and device != _CPU
    if is_offloaded and settings.max_models_gb is not None:
        raise OffloadError(
            f"offload is {settings.offload!r} and max_models_gb is {settings.max_models_gb:g}; models leave the device "
            "one way or the other: leave one out"
        )
    max_bytes = None if settings.max_models_gb is None else round(settings.max_models_gb * 1e9)
    quantization = "none" if settings.quantization == "auto" else settings.quantization
    stays = max_bytes is None and not is_offloaded
    text_encoders: dict[str, Qwen3Model] = {}
    fingerprints = Fingerprints()
    models: list[LoadedModel] = []
    for name in settings.model:
        folder, text_encoder = find(settings, name)
        model = load(
            folder,
            text_encoder=text_encoder,
            device=device,
            dtype=dtype,
            name=Path(name).name,
            # In full the weights may have no room on a card that they have room for rounded.
            home=device if stays and quantization == "none" else _CPU,
            text_encoders=text_encoders,
            fingerprints=fingerprints,
        )
        _check_apart(model, models)
        quantize(model.dit, quantization)
        for part in model.parts if stays else ():
            move_to(device)(part)
        models.append(model)
    if is_offloaded:
        offload(models, device, layers=settings.offload == "layer")
    if settings.compile and can_compile(describe_card(device)):
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


def offload(models: Sequence[LoadedModel], device: torch.device, *, layers: bool) -> None:
    """Have networks that are in the CPU's memory come to a device as they are used: all but the transformer.

    That comes to stay, or its layers one by one if `layers`. The table of words stays where it is, and is read there.
    """
    for model in models:
        if layers:
            model.dit.offload_layers(device)
        else:
            Piece(model.dit.modules(), device).take()
        for codes in (model.code_encoder, model.code_decoder):
            come_when_called(codes, Piece(codes.modules(), device))
    # A part may be of several models.
    for module in {module for model in models for part in model.conditioner.parts for module in part.modules()}:
        if not isinstance(module, nn.Embedding):
            come_when_called(module, Piece([module], device))


def _check_apart(model: LoadedModel, others: list[LoadedModel]) -> None:
    for other in others:
        if model.name == other.name:
            raise SameModelError(f"two models are called {model.name}; rename the directory of one")
        if model.model_fingerprint == other.model_fingerprint:
            raise SameModelError(f"{other.name} and {model.name} are the same model; leave one out")
