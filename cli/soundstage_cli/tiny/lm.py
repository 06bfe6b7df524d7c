"""A small random planner in the layout of the released language models."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from soundstage_cli.tiny.tokenizer import byte_tokenizer

NUM_CODES = 1_000


def write_lm(folder: Path, *, seed: int = 0, prefixed: bool = False) -> None:
    """Write a Qwen3 of 2 layers with its tokenizer to `folder`.

    The released checkpoints name tensors `layers.0...`; with `prefixed` they are named `model.layers.0...`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(num_codes=NUM_CODES)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40_960,
        initializer_range=0.2,  # wide, so that what comes out depends on what went in
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    prefix = "model." if prefixed else ""
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in model.model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
