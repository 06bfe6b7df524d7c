"""Whose weights are on the device, where it cannot hold those of all models at once."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import structlog
import torch
from torch import Tensor, nn

from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import StartError

_log = structlog.get_logger()

Move = Callable[[nn.Module], object]


class ModelTooLargeError(StartError):
    """A model has no room on the device, even with no other beside it."""


class Residence:
    """Keeps weights of at most `max_bytes` on the device; models that share a part share its place.

    Nothing is on it at first. `take` brings a part there, `send` takes it away. For the thread that runs the models.
    """

    def __init__(self, models: Sequence[LoadedModel], *, max_bytes: int, take: Move, send: Move) -> None:
        """Raises ModelTooLargeError."""
        for model in models:
            check_size([model], max_bytes)
        self.max_bytes = max_bytes
        self._take, self._send = take, send
        self._sizes = {model: sizes_of(model) for model in models}
        self._parts = {id(part): part for model in models for part in model.parts}
        self._here: dict[int, int] = {}  # bytes by part
        self._by_use = list(models)  # the latest used last
        self._latest_s: dict[LoadedModel, float] = {}

    def sizes(self, model: LoadedModel) -> Mapping[int, int]:
        """Return the bytes of each part of a model."""
        return self._sizes[model]

    def has(self, model: LoadedModel) -> bool:
        """Tell whether all of a model is on the device."""
        return self._sizes[model].keys() <= self._here.keys()

    def wait_s(self, model: LoadedModel) -> float:
        """Return how long a model took to come in the last time; 0 where it never did."""
        return self._latest_s.get(model, 0.0)

    def bring_in(self, model: LoadedModel, in_use: Collection[LoadedModel]) -> None:
        """Bring a model to the device; those not used for longest make room, and those `in_use` never.

        All that are in use must fit together with it.
        """
        self._by_use.remove(model)
        self._by_use.append(model)
        if self.has(model):
            return
        start = time.perf_counter()
        wanted = self._sizes[model]
        kept = wanted.keys() | {part for other in in_use for part in self._sizes[other]}
        for other in self._by_use:
            if sum((self._here | wanted).values()) <= self.max_bytes:
                break
            self._send_away([part for part in self._sizes[other] if part in self._here and part not in kept])
        for part, size_bytes in wanted.items():
            if part not in self._here:
                self._bring(part, size_bytes)
        self._latest_s[model] = time.perf_counter() - start
        here = [other.name for other in self._by_use if self.has(other)]
        _log.info("model_brought_in", model=model.name, on_device=here, took_s=round(self._latest_s[model], 3))

    def _bring(self, part: int, size_bytes: int) -> None:
        try:
            self._take(self._parts[part])
        except BaseException:
            self._send(self._parts[part])  # half of it may be there
            raise
        self._here[part] = size_bytes

    def _send_away(self, parts: Sequence[int]) -> None:
        for part in parts:
            del self._here[part]
            self._send(self._parts[part])


def check_size(models: Sequence[LoadedModel], max_bytes: int) -> None:
    """Raise ModelTooLargeError where models do not fit the device together."""
    size_bytes = sum({part: size for model in models for part, size in sizes_of(model).items()}.values())
    if size_bytes > max_bytes:
        names = " and ".join(model.name for model in models)
        raise ModelTooLargeError(
            f"max_models_gb is {max_bytes / 1e9:.4g}, and the weights of {names} take {size_bytes / 1e9:.4g} GB; "
            "give more, or take a smaller dtype or quantization"
        )


def sizes_of(model: LoadedModel) -> dict[int, int]:
    """Return the bytes of each part of a model."""
    return {id(part): weight_bytes(part) for part in model.parts}


def weight_bytes(part: nn.Module) -> int:
    """Return the bytes of a network's weights."""
    return sum(map(_size_bytes, part.state_dict().values()))


def move_to(device: torch.device) -> Move:
    """Return what moves a part to a device."""
    return lambda part: part.to(device)


def _size_bytes(tensor: Any) -> int:
    # A quantised weight has the type that it stands for, and tensors inside.
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not Tensor:
        return sum(_size_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes if isinstance(tensor, Tensor) else 0
