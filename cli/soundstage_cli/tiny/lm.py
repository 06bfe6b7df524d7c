"""A small random planner in the layout of the released language models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from soundstage_cli.tiny.tokenizer import byte_tokenizer

NUM_CODES: Final = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a planner; `vocab_size` 0 is that of its tokenizer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    initializer_range: float
    num_codes: int
    vocab_size: int = 0
    texts: tuple[str, ...] = ()  # whose words are a token each
    dtype: torch.dtype = torch.float32


TINY: Final = Shape(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    initializer_range=0.2,  # wide, so that what comes out depends on what went in
    num_codes=NUM_CODES,
)
# The smallest of the released planners, 0.66 billion parameters: for measurements.
SMALL: Final = Shape(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    initializer_range=0.02,
    num_codes=64_000,
    vocab_size=217_204,
    texts=(
        "system user assistant # Instruction\nGenerate audio semantic tokens based on the given conditions:\n\n",
        "# Caption\na warm lo-fi beat, take\n\n# Lyric\n[Instrumental]\n NO USER INPUT",
        "bpm: duration: keyscale: G major\nlanguage: timesignature:\n\n",
    ),
    dtype=torch.bfloat16,
)


def write_lm(folder: Path, *, seed: int = 0, prefixed: bool = False, shape: Shape = TINY, device: str = "cpu") -> None:
    """Write a random Qwen3 with its tokenizer to `folder`; its weights are drawn on `device`, and other ones on each.

    The released checkpoints name tensors `layers.0...`; with `prefixed` they are named `model.layers.0...`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(num_codes=shape.num_codes, texts=shape.texts)
    config = Qwen3Config(
        vocab_size=shape.vocab_size or len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40_960,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        dtype=shape.dtype,
    )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(shape.dtype)
        try:
            model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    prefix = "model." if prefixed else ""
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in model.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
