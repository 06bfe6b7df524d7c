"""The compiled snake against the plain one. The compilers here need no compiler of C: what they are given they run."""

from collections.abc import AsyncIterator, Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import Snake1d
from numpy.typing import NDArray
from structlog.testing import capture_logs
from torch import Tensor
from torch._dynamo.utils import counters

from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec
from soundstage_vae.decoder import copy_to_host
from soundstage_vae.engine import VaeEngine
from soundstage_vae.snake import Snake, bend, compile_bend

CPU = torch.device("cpu")
Floats = NDArray[np.float32]
Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A compiler that remembers nothing."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiled(tiny_vae: Path) -> Codec:
    codec = Codec(tiny_vae, device=CPU, dtype=torch.float32)
    assert codec.compile_snakes("eager")
    return codec


def draw_latents(frames: int) -> Floats:
    return np.random.default_rng(frames).standard_normal((frames, 64)).astype(np.float32)


@torch.inference_mode()
def test_a_snake_has_the_bits_of_diffusers_own() -> None:
    theirs = Snake1d(5)
    theirs.alpha.normal_(generator=torch.Generator().manual_seed(1))
    theirs.beta.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(3))
    before = x.clone()
    assert torch.equal(Snake(theirs)(x), theirs(x))
    assert torch.equal(x, before)


def test_one_program_serves_tiles_of_any_length_and_number_both_ways(compiled: Codec, codec: Codec) -> None:
    for frames in (9, 1, 2, 33):
        np.testing.assert_array_equal(compiled.decode(draw_latents(frames)), codec.decode(draw_latents(frames)))
    batch = [draw_latents(5), draw_latents(5)[::-1]]
    for found, expected in zip(compiled.decode_batch(batch), codec.decode_batch(batch), strict=True):
        np.testing.assert_array_equal(found, expected)
    for samples in (1920, 9000):
        audio = np.random.default_rng(samples).uniform(-0.3, 0.3, (samples, 2)).astype(np.float32)
        np.testing.assert_array_equal(compiled.encode(audio), codec.encode(audio))
    assert counters["stats"]["unique_graphs"] == 1


async def test_a_range_is_cut_from_the_song_to_the_bit(tiny_vae: Path) -> None:
    worker, latents = Worker("vae"), draw_latents(50)
    codec = await worker.run(Codec, tiny_vae, device=CPU, dtype=torch.float32)
    assert await worker.run(codec.compile_snakes, "eager")
    engine = VaeEngine(codec, worker, windows=(32,))

    async def decode(cut: int, wanted: range) -> Floats:
        async def feed() -> AsyncIterator[Floats]:
            yield latents[:cut]
            yield latents[cut:]

        return np.concatenate([samples async for samples in engine.decode(feed(), len(latents), wanted)])

    whole = await decode(1, range(50 * 1920))
    np.testing.assert_array_equal(await decode(37, range(30_000, 70_000)), whole[30_000:70_000])
    assert counters["stats"]["unique_graphs"] == 1
    engine.close()


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(1, 6, 50), (3, 6, 2), (2, 1, 9), (1, 6, 1)])
def test_what_the_compiler_was_shown_is_the_snake(shape: tuple[int, int, int]) -> None:
    compiled = compile_bend(CPU, [torch.float32], "aot_eager")
    assert compiled is not None
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(4))
    frequency, amplitude = torch.rand(2, 1, shape[1], 1, generator=torch.Generator().manual_seed(5)) + 0.5
    torch.testing.assert_close(compiled(x, frequency, amplitude), bend(x, frequency, amplitude), rtol=0, atol=1e-6)


def test_each_dtype_has_its_program_before_the_first_tile(tiny_vae: Path) -> None:
    codec = Codec(tiny_vae, device=CPU, dtype=torch.bfloat16, last_layers_fp32=True)
    assert codec.compile_snakes("eager")
    assert counters["stats"]["unique_graphs"] == 2
    codec.decode(draw_latents(3))
    assert counters["stats"]["unique_graphs"] == 2


def fail(*_: object) -> Program:
    raise RuntimeError("no kernel for this card\nand a page of reasons")


def compile_wrongly(graph: torch.fx.GraphModule, _examples: object) -> Program:
    def run(*arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(bent + 0.001 for bent in graph(*arguments))

    return run


@pytest.mark.parametrize(
    ("backend", "why"),
    [(fail, "no kernel for this card"), (compile_wrongly, "in torch.float32 the compiled snake is off by 0.001")],
)
def test_where_the_compiler_fails_all_runs_as_it_was(
    tiny_vae: Path, codec: Codec, backend: Callable[..., Program], why: str
) -> None:
    plain = Codec(tiny_vae, device=CPU, dtype=torch.float32)
    with capture_logs() as logs:
        assert not plain.compile_snakes(backend)
        assert np.array_equal(plain.decode(draw_latents(3)), codec.decode(draw_latents(3)))
    [line] = logs
    assert line["event"] == "compile_failed"
    assert why in line["why"]


@torch.inference_mode()
def test_a_copy_runs_compiled_but_on_the_host_plain(tiny_vae: Path) -> None:
    calls: list[int] = []

    def count(graph: torch.fx.GraphModule, _examples: object) -> Program:
        def run(*arguments: Tensor) -> Any:
            calls.append(len(arguments))
            return graph(*arguments)

        return run

    codec = Codec(tiny_vae, device=CPU, dtype=torch.float32)
    assert codec.compile_snakes(count)
    latents = torch.randn(1, 64, 2, generator=torch.Generator().manual_seed(6))
    calls.clear()
    on_host = copy_to_host(codec.decoder)(latents)
    assert not calls
    assert torch.equal(deepcopy(codec.decoder)(latents), on_host)
    assert calls
