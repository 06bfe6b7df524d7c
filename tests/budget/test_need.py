"""What is predicted of memory beside what the networks really take, each in a process of its own on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from soundstage_budget.models import TransformerShape, VaeModel
from soundstage_budget.need import decode_bytes, encode_bytes, piece_bytes, token_step_bytes, velocity_bytes

# Large tensors go back to the system at once, so that what is resident is what is alive.
ALIVE_ONLY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
TOLERANCE = 0.15


def measure(network: str, *cases: tuple[int, ...]) -> list[int]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("measure.py")), network, json.dumps(cases)]
    done = subprocess.run(command, env={**os.environ, **ALIVE_ONLY}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shape(width: int, layers: int, *, heads: int) -> TransformerShape:
    return TransformerShape(
        width=width, mlp_width=3 * width, layers=layers, heads=heads, kv_heads=heads // 2, head_dim=128
    )


@pytest.mark.soak
@pytest.mark.parametrize(
    ("network", "width", "frames", "songs"),
    [
        ("dit-tiny", 256, 15_000, 1),
        ("dit-mid", 512, 750, 1),
        ("dit-mid", 512, 3_000, 1),
        ("dit-short", 512, 3_000, 4),
        ("dit-short", 512, 15_000, 1),
    ],
)
def test_a_forward_pass_of_the_diffusion(network: str, width: int, frames: int, songs: int) -> None:
    [taken] = measure(network, (frames, songs))
    predicted = velocity_bytes(
        shape(width, 8, heads=width // 128),
        tokens=frames // 2,  # songs go through the layers one by one
        longest=frames // 2,
        itemsize=4,
        in_blocks=True,
    )
    assert predicted == pytest.approx(taken, rel=TOLERANCE)


@pytest.mark.soak
@pytest.mark.parametrize(("network", "channels", "frames"), [("vae-tiny", 8, 1024), ("vae-mid", 32, 256)])
def test_a_tile_of_the_codec(network: str, channels: int, frames: int) -> None:
    short, long, decoded = measure(network, (32, 1), (64, 1), (frames, 0))
    encoder = VaeModel(
        variant=network,
        encoder_parameters=0,
        decoder_parameters=0,
        largest_tensor=128 * 128 * 20,
        channels=128,
        frame_values=256 * 240,
    )
    decoder = replace(encoder, channels=channels, frame_values=2 * channels * 240)
    assert encode_bytes(encoder, 32, itemsize=4, on_card=False) == pytest.approx(short, rel=TOLERANCE)
    assert encode_bytes(encoder, 64, itemsize=4, on_card=False) == pytest.approx(long, rel=TOLERANCE)
    assert decode_bytes(decoder, frames, itemsize=4, on_card=False) == pytest.approx(decoded, rel=TOLERANCE)


@pytest.mark.parametrize(("network", "width", "layers"), [("lm-tiny", 128, 2), ("lm-mid", 512, 8)])
def test_keys_values_and_steps_of_the_planner(network: str, width: int, layers: int) -> None:
    planner = shape(width, layers, heads=16)
    few, piece, many = measure(network, (2, 512, 1), (1, 2048, 128), (4, 2048, 1))
    for taken, rows, length, work in (
        (few, 2, 576, token_step_bytes(planner, cached_tokens=2 * 576, itemsize=4)),
        (piece, 1, 2176, piece_bytes(planner, length=2176, piece=128, itemsize=4)),
        (many, 4, 2112, token_step_bytes(planner, cached_tokens=4 * 2112, itemsize=4)),
    ):
        assert rows * planner.kv_bytes(length, 4) + work == pytest.approx(taken, rel=TOLERANCE)
