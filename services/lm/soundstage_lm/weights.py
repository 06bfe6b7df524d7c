"""A planner's checkpoint, from its folder to a network ready to run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from soundstage_device.linear import pack_linears
from soundstage_device.weights import build, read_weights
from soundstage_lm.model.qwen3 import LIFT, Qwen3, Qwen3Config
from soundstage_lm.tokenizer import PlannerTokenizer, load_tokenizer, tokenizer_files
from soundstage_runtime.checkpoint import CheckpointError, Fingerprints, read_json, weight_files

_CONFIG: Final = "config.json"
_HEAD: Final = "lm_head.weight"
_UP: Final = "mlp.up_proj"
_JOINED: Final = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", _UP),
}
_SIZES: Final = {(1024, 28): "0.6B", (2048, 28): "1.7B", (2560, 36): "4B"}
# What the network assumes, and what a configuration that is silent means by it.
_ASSUMED: Final[dict[str, tuple[Any, Any]]] = {
    "model_type": ("qwen3", None),
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "use_sliding_window": (False, False),
    "tie_word_embeddings": (True, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A planner without its weights."""

    config: Qwen3Config
    tokenizer: PlannerTokenizer
    variant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A loaded planner."""

    model: Qwen3
    tokenizer: PlannerTokenizer
    variant: str


def begin_fingerprint(folder: Path) -> Callable[[], str]:
    """Begin to hash a planner's files, beside whoever loads it; what it returns waits for their fingerprint."""
    return Fingerprints().begin([folder / _CONFIG, *tokenizer_files(folder), *weight_files(folder)])


def load_outline(folder: Path) -> Outline:
    """Load all but the weights. Raises CheckpointError naming what is wrong."""
    config = read_config(folder / _CONFIG)
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens, the model only {config.vocab_size}"
        )
    size = (config.hidden_size, config.num_hidden_layers)
    return Outline(config=config, tokenizer=tokenizer, variant=_SIZES.get(size, f"{size[0]}x{size[1]}"))


def load_checkpoint(
    folder: Path, *, device: torch.device, dtype: torch.dtype, outline: Outline | None = None, packed: bool = False
) -> Checkpoint:
    """Load configuration, tokenizer and weights, `packed` to be run and no more to be read.

    Raises CheckpointError naming what is wrong.
    """
    outline = outline or load_outline(folder)
    config = outline.config
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_weights(folder).items()}
    head = tensors.pop(_HEAD, None)
    if head is not None and not torch.equal(head, tensors.get("embed_tokens.weight", head[:0])):
        raise CheckpointError(f"{folder}: {_HEAD} is not the embedding that the configuration says it is tied to")
    fused = fuse(tensors, config)
    model = build(lambda: Qwen3(config), fused, where=str(folder), device=device, dtype=dtype)
    if packed:
        pack_linears(model)
    return Checkpoint(model=model, tokenizer=outline.tokenizer, variant=outline.variant)


def fuse(tensors: Mapping[str, Tensor], config: Qwen3Config) -> dict[str, Tensor]:
    """Join what has the same input in a layer, heads' norms too, and lower the MLPs' inner values by LIFT.

    Every tensor is a copy: weights that stay in the mapped file can be paged out in the middle of a song. What is
    incomplete or misshapen is left as it is, for `build` to name.
    """
    left = dict(tensors)
    fused: dict[str, Tensor] = {}
    heads = (config.num_attention_heads, config.num_key_value_heads)
    for layer in range(config.num_hidden_layers):
        for joined, parts in _JOINED.items():
            names = [f"layers.{layer}.{part}.weight" for part in parts]
            if all(name in left for name in names) and len({left[name].shape[1:] for name in names}) == 1:
                found = [left.pop(name) for name in names]
                if parts[-1] == _UP:
                    found[-1] = found[-1] / LIFT
                fused[f"layers.{layer}.{joined}.weight"] = torch.cat(found)
        norms = [f"layers.{layer}.self_attn.{part}_norm.weight" for part in "qk"]
        if all(name in left and left[name].dim() == 1 for name in norms):
            repeated = [left.pop(name).expand(heads, -1) for name, heads in zip(norms, heads, strict=True)]
            fused[f"layers.{layer}.self_attn.qk_norm.weight"] = torch.cat(repeated)
    return fused | {name: tensor.clone() for name, tensor in left.items()}


def read_config(path: Path) -> Qwen3Config:
    """Read a Qwen3's config.json, of older or newer transformers. Raises CheckpointError."""
    found = read_json(path)
    for name, (wanted, silent) in _ASSUMED.items():
        if found.get(name, silent) != wanted:
            raise CheckpointError(f"{path}: {name} is {found.get(name, silent)!r}; only {wanted!r} is supported")
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{path}: the rotary embedding is {kind!r}; only 'default' is supported")
    values: dict[str, Any] = {"rope_theta": rope.get("rope_theta"), **found}
    missing = [field.name for field in fields(Qwen3Config) if values.get(field.name) is None]
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(missing)}")
    return Qwen3Config(**{field.name: values[field.name] for field in fields(Qwen3Config)})
