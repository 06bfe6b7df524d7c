"""Steps that run out of memory: texts take them in parts, and only one that has no room for a token by itself ends."""

import asyncio
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
import torch
from torch import Tensor

from soundstage_device.worker import DeviceMemoryError, DeviceWorker
from soundstage_lm.brief import Sampling
from soundstage_lm.grammar import Grammar
from soundstage_lm.model.cache import KvCache, Span
from soundstage_lm.model.qwen3 import Qwen3
from soundstage_lm.torch_engine import TorchWriter
from soundstage_lm.weights import Checkpoint

from .test_torch_engine import NUM_TEXTS, make_prompt, make_text, write, write_together

PIECE = 128  # tokens of prompts that a step on a CPU reads at most


class Small:
    """A planner on a device that has no room for more than `room` tokens at once, nor for rows longer than `reach`."""

    def __init__(self, model: Qwen3, *, room: int, reach: int) -> None:
        self._model, self.room, self.reach = model, room, reach
        self.error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.sizes: list[int] = []  # of all attempts, in tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def read(self, cache: KvCache, spans: Sequence[Span]) -> Tensor:
        self.sizes.append(sum(len(span.tokens) for span in spans))
        hidden = self._model.read(cache, spans)  # so that what a failed attempt leaves behind is there
        if self.sizes[-1] > self.room or any(span.end > self.reach for span in spans):
            raise self.error
        return hidden


@contextmanager
def on_small_device(
    checkpoint: Checkpoint, grammar: Grammar, *, room: int = 1000, reach: int = 1000
) -> Generator[tuple[Small, TorchWriter]]:
    model = Small(checkpoint.model, room=room, reach=reach)
    with closing(DeviceWorker("lm")) as worker:
        yield model, TorchWriter(replace(checkpoint, model=cast(Qwen3, model)), worker, grammar)


async def test_texts_that_have_no_room_together_are_those_that_they_are_alone(
    checkpoint: Checkpoint, byte_grammar: Grammar, writer: TorchWriter
) -> None:
    texts = [make_text(number, Sampling(), count=40) for number in range(NUM_TEXTS)]
    expected = [await write(writer, text) for text in texts]
    with on_small_device(checkpoint, byte_grammar, room=PIECE) as (model, small):
        assert await write_together(small, texts) == expected
    assert max(model.sizes) > PIECE
    assert (small.num_live, small.num_pages_used) == (0, 0)


async def test_steps_without_prompts_are_halved_until_they_fit(
    checkpoint: Checkpoint, byte_grammar: Grammar, writer: TorchWriter
) -> None:
    text = make_text(3, Sampling(), count=9)
    expected = await write(writer, text)
    with on_small_device(checkpoint, byte_grammar, room=PIECE) as (model, small):
        found: list[int] = []
        async for token in small.write(text):
            if not found:
                model.room, model.sizes = 1, []
            found.append(token)
        assert found == expected
    assert model.sizes == [2, 1, 1] * 8


@pytest.mark.parametrize("room", [90, 1])
async def test_a_piece_without_room_is_read_in_parts(
    checkpoint: Checkpoint, byte_grammar: Grammar, writer: TorchWriter, room: int
) -> None:
    text = make_text(1, Sampling(), count=9)
    expected = await write(writer, text)
    with on_small_device(checkpoint, byte_grammar, room=room) as (model, small):
        assert await write(small, text) == expected
    assert sum(size for size in model.sizes if size <= room) == sum(len(prompt) + 8 for prompt in text.prompts)


async def test_the_libraries_below_torch_are_understood_too(
    checkpoint: Checkpoint, byte_grammar: Grammar, writer: TorchWriter
) -> None:
    text = make_text(1, Sampling(), count=9)
    expected = await write(writer, text)
    with on_small_device(checkpoint, byte_grammar, room=90) as (model, small):
        model.error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        assert await write(small, text) == expected


@pytest.mark.parametrize("lengths", [(300, 20), (95, 5)], ids=["in its prompts", "as it begins to write"])
async def test_only_a_text_without_room_by_itself_ends(
    checkpoint: Checkpoint, byte_grammar: Grammar, writer: TorchWriter, lengths: Sequence[int]
) -> None:
    first, large, *others = [make_text(number, Sampling(), count=30) for number in (0, 1, 2, 5)]
    large = replace(large, prompts=tuple(make_prompt(length, length) for length in lengths))
    expected = [await write(writer, text) for text in (first, *others)]
    with on_small_device(checkpoint, byte_grammar, reach=90) as (_, small):
        found = await asyncio.gather(*(write(small, text) for text in (first, large, *others)), return_exceptions=True)
    failure = found.pop(1)
    assert isinstance(failure, DeviceMemoryError)
    assert "no memory left for this text just now; shorter words" in failure.message
    assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert found == expected
    assert (small.num_live, small.num_pages_used) == (0, 0)


async def test_pieces_are_halved_when_memory_runs_out_and_grow_again(
    checkpoint: Checkpoint, byte_grammar: Grammar, writer: TorchWriter
) -> None:
    text = make_text(1, Sampling(), count=30)
    expected = await write(writer, text)
    with on_small_device(checkpoint, byte_grammar, room=PIECE - 20) as (model, small):
        assert await write(small, text) == expected
        assert model.sizes[:6] == [PIECE, 64, 64, 66, 68, 58]  # the last is the rest of both prompts
        model.room, model.sizes = 1000, []
        await write(small, text)
        assert max(model.sizes) == PIECE
