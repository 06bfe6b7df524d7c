"""Adapters on disk: PEFT's directories, single files as ComfyUI has them, LoKr as LyCORIS and PEFT write it."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final, Literal

import grpc
import torch
from pydantic import AliasChoices, BaseModel, Field, FiniteFloat, PositiveInt, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from soundstage_device.device import dtype_name
from soundstage_dit.model.adapter import Delta, Kronecker, LowRank
from soundstage_runtime.checkpoint import CheckpointError, read_json
from soundstage_runtime.errors import ServiceError

Kind = Literal["lora", "lokr"]

_FILES: Final = (("adapter_model.safetensors", "adapter_config.json"), ("lokr_weights.safetensors", "lokr_config.json"))
_HEADER: Final = "lokr_config"  # where a single file may hold a configuration
# What exporters put before the name of a layer.
_PREFIX: Final = re.compile(r"^(base_model\.model\.|diffusion_model\.|lycoris_)?(decoder[._])?")
_PART: Final = re.compile(
    r"\.(?:(lora_A|lora_B|lora_down|lora_up)(?:\.[\w-]+)?\.weight|(lokr_w[12](?:_[ab])?)(?:\.[\w-]+)?|(alpha))$"
)
_SYNONYMS: Final = {"lora_A": "lora_down", "lora_B": "lora_up"}
_DORA: Final = ("dora_scale", "lora_magnitude_vector")

_Parts = dict[str, Tensor]
_LayerName = Annotated[str, StringConstraints(pattern=r"^\^?[\w.]+$")]


class AdapterFileError(ServiceError):
    """An adapter cannot be read, or is not made for this model."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_REFUSED"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFile:
    """What is read: its kind, the largest rank in it, and its changes by the name of the layer."""

    kind: Kind
    rank: int
    deltas: Mapping[str, Delta]


class _Config(BaseModel):
    """What is said beside the tensors; patterns are plain names of layers, or their ends."""

    peft_type: Literal["LORA", "LOKR"] = "LORA"
    use_dora: Literal[False] = False
    use_rslora: bool = False
    rank: PositiveInt | None = Field(None, validation_alias=AliasChoices("r", "linear_dim"))
    alpha: FiniteFloat | None = Field(None, validation_alias=AliasChoices("lora_alpha", "alpha", "linear_alpha"))
    rank_pattern: dict[_LayerName, PositiveInt] = {}
    alpha_pattern: dict[_LayerName, FiniteFloat] = {}

    def rank_of(self, layer: str) -> int | None:
        return next((rank for name, rank in self.rank_pattern.items() if _is_named(layer, name)), self.rank)

    def alpha_of(self, layer: str) -> float | None:
        return next((alpha for name, alpha in self.alpha_pattern.items() if _is_named(layer, name)), self.alpha)


def find_files(path: Path) -> tuple[Path, Path | None]:
    """Find the weights and the configuration of an adapter, a file or a directory; raises AdapterFileError."""
    if not path.is_dir():
        if path.suffix == ".safetensors" and path.is_file():
            return path, None
        raise AdapterFileError(f"{path.name} is no directory and no .safetensors file; nothing else is read")
    for weights, config in _FILES:
        if (path / weights).is_file():
            return path / weights, path / config
    raise AdapterFileError(
        f"{path.name} holds neither {_FILES[0][0]} nor {_FILES[1][0]}; pickles such as adapter_model.bin can run code "
        "and are not read: save the adapter as safetensors"
    )


def read_adapter(
    weights: Path, config: Path | None, model: nn.Module, *, device: torch.device, dtype: torch.dtype
) -> AdapterFile:
    """Read an adapter for `model`, ready to use; raises AdapterFileError naming the first tensor that does not fit."""
    try:
        with safe_open(weights, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in sorted(file.keys())}
            header: dict[str, str] = file.metadata() or {}
        said = _Config.model_validate(read_json(config) if config else json.loads(header.get(_HEADER, "{}")))
    except ValidationError as error:
        bad = error.errors()[0]
        field = ".".join(map(str, bad["loc"]))
        message = f"the configuration of {weights.name}: {field} is {str(bad['input'])[:80]!r}: {bad['msg']}"
        raise AdapterFileError(message) from error
    except (SafetensorError, CheckpointError, OSError, ValueError) as error:
        raise AdapterFileError(f"{weights.name} cannot be read: {error}") from error
    layers = adaptable(model)
    groups = _by_layer(tensors, layers)
    kinds: set[Kind] = {"lokr" if any("lokr" in part for part in parts) else "lora" for parts in groups.values()}
    if len(kinds) != 1:
        raise AdapterFileError(
            f"{weights.name} holds {' and '.join(sorted(kinds)) or 'no tensors'}; one kind is wanted"
        )
    [kind] = kinds
    make = _lokr if kind == "lokr" else _lora
    made = {layer: make(layer, parts, layers[layer], said) for layer, parts in groups.items()}
    deltas = {layer: delta.to(device, dtype) for layer, (_, delta) in made.items()}
    for layer, delta in deltas.items():
        if not delta.is_finite():
            raise AdapterFileError(f"{layer}: what the adapter adds is not finite in {dtype_name(dtype)}")
    return AdapterFile(kind=kind, rank=max(rank for rank, _ in made.values()), deltas=deltas)


def adaptable(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers of a transformer that adapters can change, by name: those that work on tokens."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("layers.", "condition_embedder"))
    }


def _by_layer(tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Linear]) -> dict[str, _Parts]:
    """Sort tensors by layer, and by what part of its change they are; in float32."""
    known = {spelling: name for name in layers for spelling in (name, name.replace(".", "_"))}
    groups: dict[str, _Parts] = {}
    for name, tensor in tensors.items():
        if any(mark in name for mark in _DORA):
            raise AdapterFileError(f"{name}: DoRA is not supported; make the adapter as a plain LoRA or LoKr")
        found = _PART.search(name)
        layer = known.get(_PREFIX.sub("", name[: found.start()])) if found else None
        if found is None or layer is None:
            raise AdapterFileError(
                f"{name} fits no layer that adapters can change: the linear ones of layers.0 to the last and "
                "condition_embedder, as lora_A and lora_B, lora_down and lora_up, or lokr_w1 and lokr_w2"
            )
        [part] = filter(None, found.groups())
        part = _SYNONYMS.get(part, part)
        if part in groups.setdefault(layer, {}):
            raise AdapterFileError(f"{name}: {layer} has {part} twice; a file must hold one adapter")
        groups[layer][part] = tensor.float()
    return groups


def _lora(layer: str, parts: _Parts, linear: nn.Linear, said: _Config) -> tuple[int, LowRank]:
    """Make a LoRA of its parts; with its rank."""
    up, down = _take(layer, parts, "lora_up", "lora_down")
    rank = len(down)
    scale = _take_scale(layer, parts, rank, said)
    _check(layer, parts, (len(up), down.shape[1]), linear)
    return rank, LowRank(down=down, up=up * scale)


def _lokr(layer: str, parts: _Parts, linear: nn.Linear, said: _Config) -> tuple[int, Kronecker]:
    """Make a LoKr of its parts; with its rank. Each of its two matrices is whole, or a product of two."""
    factors = [
        _take(layer, parts, name) if name in parts else _take(layer, parts, f"{name}_a", f"{name}_b")
        for name in ("lokr_w1", "lokr_w2")
    ]
    ranks = [len(factor[1]) for factor in factors if len(factor) == 2]
    scale = _take_scale(layer, parts, ranks[-1] if ranks else None, said)
    _check(layer, parts, (math.prod(len(f[0]) for f in factors), math.prod(f[-1].shape[1] for f in factors)), linear)
    left, right = (reduce(torch.matmul, factor) for factor in factors)
    rank = ranks[-1] if ranks else said.rank_of(layer) or min(right.shape)
    return rank, Kronecker(left=left * scale, right=right)


def _take(layer: str, parts: _Parts, *names: str) -> list[Tensor]:
    """Take matrices whose product is wanted out of the parts."""
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterFileError(f"{layer} lacks {missing[0]}")
    taken = [parts.pop(name) for name in names]
    shapes = [list(matrix.shape) for matrix in taken]
    if any(len(shape) != 2 for shape in shapes) or any(a[1] != b[0] for a, b in pairwise(shapes)):
        raise AdapterFileError(
            f"{layer}: {' and '.join(names)} of {' and '.join(map(str, shapes))} are no matrices that fit"
        )
    return taken


def _take_scale(layer: str, parts: _Parts, rank: int | None, said: _Config) -> float:
    """Take alpha over rank; 1 where one of them is unknown, as LyCORIS has it for a LoKr of whole matrices."""
    stated = said.rank_of(layer)
    if rank is not None and stated not in (None, rank):
        raise AdapterFileError(f"{layer} has rank {rank}, but its configuration says {stated}")
    rank = rank or stated
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise AdapterFileError(f"{layer}: alpha is {list(parts['alpha'].shape)}; one number is wanted")
    alpha = parts.pop("alpha").item() if "alpha" in parts else said.alpha_of(layer)
    if alpha is None or rank is None:
        return 1.0
    return alpha / (math.sqrt(rank) if said.use_rslora else rank)


def _check(layer: str, parts: _Parts, shape: tuple[int, int], linear: nn.Linear) -> None:
    """Refuse a change of another shape than the layer's weight, and parts that nothing was made of."""
    wanted = (linear.out_features, linear.in_features)
    if shape != wanted:
        raise AdapterFileError(
            f"{layer}: the adapter is for a layer of {list(shape)}, and this model's is {list(wanted)}"
        )
    if parts:
        raise AdapterFileError(f"{layer}: {min(parts)} is one part too many")


def _is_named(layer: str, pattern: str) -> bool:
    """Tell whether a pattern is the layer's whole name, after which a caret asks, or the end of it."""
    if pattern.startswith("^"):
        return pattern[1:] in (layer, f"decoder.{layer}")
    return f".decoder.{layer}".endswith(f".{pattern}")
