"""`python measure.py NETWORK CASES`: print, in JSON, the bytes that each case of a network takes beside its weights.

A process of its own, so that nothing else is measured. CASES is a JSON list of lists of numbers.
"""

import ctypes
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from soundstage_device.linear import pack_linears


def resident_bytes(name: str) -> int:
    """Read a size from the kernel's account of this process: VmRSS now, VmHWM at its highest."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(work: Callable[[], None]) -> int:
    """Return how much higher memory goes in `work` than it is before."""
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier case left
    Path("/proc/self/clear_refs").write_text("5")  # the highest is now
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def make_dit(width: int, layers: int) -> Callable[..., int]:
    """Return a measure of a forward pass over `batch` songs of `frames`."""
    from soundstage_dit.model.dit import Dit
    from soundstage_dit.model.shape import DitShape, StackShape

    stack = StackShape(
        width=width,
        mlp_width=3 * width,
        heads=width // 128,
        kv_heads=width // 256,
        head_dim=128,
        windows=(128, None) * (layers // 2),
        rope_theta=1e6,
        eps=1e-6,
    )
    dit = Dit(DitShape(stack=stack, condition_width=width, in_channels=192, channels=64, patch=2))
    for parameter in dit.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    pack_linears(dit)

    def run(frames: int, batch: int) -> int:
        memories = [dit.remember(torch.randn(300, width)) for _ in range(batch)]
        latents = [torch.randn(frames, 64) for _ in range(batch)]
        contexts = [torch.randn(frames, 128) for _ in range(batch)]
        return measure(lambda: void(dit(latents, torch.full((batch,), 0.5), contexts, memories)))

    run(8, 1)
    return run


def make_vae(channels: int) -> Callable[..., int]:
    """Return a measure of decoding, or encoding if it `encodes`, a window of `frames`."""
    from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

    from soundstage_vae.codec import Codec

    vae = AutoencoderOobleck(
        encoder_hidden_size=128,
        downsampling_ratios=[2, 4, 4, 6, 10],
        channel_multiples=[1, 2, 1, 1, 1],
        decoder_channels=channels,
        decoder_input_channels=64,
        sampling_rate=48_000,
    )
    with TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        codec = Codec(Path(folder), device=torch.device("cpu"), dtype=torch.float32)

    def run(frames: int, encodes: int) -> int:
        if encodes:
            samples = np.ones((frames * 1920, 2), np.float32)
            return measure(lambda: void(codec.encode(samples)))
        latents = np.ones((frames, 64), np.float32)
        return measure(lambda: void(codec.decode(latents)))

    run(1, 0)
    run(1, 1)
    return run


def make_lm(width: int, layers: int) -> Callable[..., int]:
    """Return a measure of reading `piece` tokens in each of `rows` rows that hold `length` already, with the cache."""
    from soundstage_lm.model.cache import Span
    from soundstage_lm.model.pages import count_pages
    from soundstage_lm.model.qwen3 import Qwen3, Qwen3Config

    config = Qwen3Config(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
    )
    model = Qwen3(config).requires_grad_(False)
    pack_linears(model)

    def run(rows: int, length: int, piece: int) -> int:
        def read() -> None:
            pages = count_pages(length + piece)
            cache = model.make_cache(rows * pages)
            cache.clear(range(rows * pages))
            places = [tuple(range(row * pages, (row + 1) * pages)) for row in range(rows)]
            void(model.read(cache, [Span(tokens=(1,) * piece, start=length, pages=place) for place in places]))

        return measure(read)

    run(1, 1, 1)
    return run


def void(_: object) -> None:
    """Let a result go."""


if __name__ == "__main__":
    torch.manual_seed(0)
    networks = {
        "dit-tiny": lambda: make_dit(256, 2),
        "dit-mid": lambda: make_dit(512, 8),
        "dit-short": lambda: make_dit(512, 2),
        "vae-tiny": lambda: make_vae(8),
        "vae-mid": lambda: make_vae(32),
        "lm-tiny": lambda: make_lm(128, 2),
        "lm-mid": lambda: make_lm(512, 8),
    }
    with torch.inference_mode():
        take = networks[sys.argv[1]]()
        print(json.dumps([take(*case) for case in json.loads(sys.argv[2])]))
