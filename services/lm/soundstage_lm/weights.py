"""A planner's checkpoint, from its folder to a network ready to run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from soundstage_device.weights import build, read_weights
from soundstage_lm.model.qwen3 import Qwen3, Qwen3Config
from soundstage_lm.tokenizer import PlannerTokenizer, load_tokenizer
from soundstage_runtime.checkpoint import CheckpointError, fingerprint, read_json, weight_files

_CONFIG: Final = "config.json"
_HEAD: Final = "lm_head.weight"
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
class Checkpoint:
    """A loaded planner."""

    model: Qwen3
    tokenizer: PlannerTokenizer
    variant: str
    fingerprint: str


def load_checkpoint(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Load configuration, tokenizer and weights. Raises CheckpointError naming what is wrong."""
    config = read_config(folder / _CONFIG)
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.size} tokens, the model only {config.vocab_size}"
        )
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_weights(folder).items()}
    head = tensors.pop(_HEAD, None)
    if head is not None and not torch.equal(head, tensors.get("embed_tokens.weight", head[:0])):
        raise CheckpointError(f"{folder}: {_HEAD} is not the embedding that the configuration says it is tied to")
    # A copy of its own: weights that stay in the mapped file can be paged out in the middle of a song.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    model = build(lambda: Qwen3(config), tensors, where=str(folder), device=device, dtype=dtype)
    size = (config.hidden_size, config.num_hidden_layers)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        variant=_SIZES.get(size, f"{size[0]}x{size[1]}"),
        fingerprint=fingerprint([folder / _CONFIG, *weight_files(folder)]),
    )


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
