"""All songs in one sequence, as a GPU has them: who sees whom, and one compiled function that gives the same."""

import asyncio
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.nn.attention.flex_attention import flex_attention

from soundstage_dit.engine import DitEngine
from soundstage_dit.model.adapter import Adaptation, LowRank
from soundstage_dit.model.attention import attend_near, attend_to_all
from soundstage_dit.model.dit import Dit
from soundstage_dit.model.together import lay_out, see
from soundstage_dit.servicer import warm_up
from soundstage_dit.song import Guidance
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.worker import Worker

from .conftest import Serving, card_of
from .test_engine import finish, song_of

CPU = torch.device("cpu")
BLOCK = 128
TOLERANCE = 1e-5

# What FlexAttention says where it is not compiled.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

lengths = st.lists(st.integers(1, 200), min_size=1, max_size=6)


@pytest.fixture
def fresh() -> Iterator[None]:
    """A compiler that remembers nothing."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def owners_of(counts: list[int]) -> Tensor:
    """Whose each place is; the last are nobody's."""
    filled = max(2 * BLOCK, -(-(sum(counts) + 1) // BLOCK) * BLOCK)
    return torch.tensor([song for song, count in enumerate([*counts, filled - sum(counts)]) for _ in range(count)])


def blocks_of(chosen: Tensor) -> Tensor:
    """Cut [queries, keys] into blocks, [rows, columns, places]."""
    return chosen.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).permute(0, 2, 1, 3).flatten(2)


@given(songs=lengths, words=st.data(), window=st.none() | st.integers(1, 300))
def test_each_song_sees_its_own_and_no_block_is_visited_in_vain(
    songs: list[int], words: st.DataObject, window: int | None
) -> None:
    is_across = window is None and words.draw(st.booleans())
    counts = words.draw(st.lists(st.integers(1, 150), min_size=len(songs), max_size=len(songs))) if is_across else songs
    queries, keys = owners_of(songs), owners_of(counts)
    mask = see(queries, keys, window, CPU)
    query, key = torch.arange(len(queries))[:, None], torch.arange(len(keys))[None]
    expected = queries[query] == keys[key]
    if window is not None:
        expected &= (query - key).abs() <= window
    nothing = torch.tensor(0)
    assert torch.equal(mask.mask_mod(nothing, nothing, query, key), expected)

    def chosen(counts: Tensor | None, indices: Tensor | None) -> Tensor:
        assert counts is not None
        assert indices is not None
        found = torch.zeros(indices.shape[2:], dtype=torch.bool)
        for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            found[row, columns[:count].long()] = True
        return found

    partial = chosen(mask.kv_num_blocks, mask.kv_indices)
    full = chosen(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert torch.equal(partial | full, blocks_of(expected).any(-1))
    assert torch.equal(full, blocks_of(expected).all(-1))


@pytest.mark.parametrize(("window", "num_whole"), [(BLOCK - 2, 0), (BLOCK - 1, 2), (2 * BLOCK - 1, 4)])
def test_a_block_whose_ends_see_each_other_is_seen_whole(window: int, num_whole: int) -> None:
    one_song = torch.zeros(2 * BLOCK, dtype=torch.long)
    counts = see(one_song, one_song, window, CPU).full_kv_num_blocks
    assert counts is not None
    assert int(counts.sum()) == num_whole


@pytest.mark.parametrize("songs", [[1], [300], [7, 250, 1, 129]])
def test_attention_by_masks_equals_attention_song_by_song(songs: list[int]) -> None:
    layout = lay_out(songs, [3] * len(songs), 16, CPU)
    source = torch.Generator().manual_seed(0)
    filled = len(layout.owners)
    queries, keys, values = (torch.randn(1, heads, filled, 16, generator=source) for heads in (4, 2, 2))
    for mask, window in ((layout.near_tokens, 16), (layout.all_tokens, None)):
        found = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=True)
        assert isinstance(found, Tensor)
        start = 0
        for length in songs:
            own = slice(start, start + length)
            parts = (queries[0, :, own], keys[0, :, own], values[0, :, own])
            expected = attend_to_all(*parts) if window is None else attend_near(*parts, window)
            torch.testing.assert_close(found[0, :, own], expected, atol=TOLERANCE, rtol=TOLERANCE)
            start += length


Songs = tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]


def songs_of(dit: Dit, frames: list[int], conditions: list[int]) -> Songs:
    """What songs of these lengths give a transformer."""
    source = torch.Generator().manual_seed(0)
    return (
        [torch.randn(count, 64, generator=source) for count in frames],
        torch.linspace(0.9, 0.2, len(frames)),
        [torch.randn(count, 128, generator=source) for count in frames],
        [dit.remember(torch.randn(count, 64, generator=source)) for count in conditions],
    )


@torch.inference_mode()
def test_one_program_serves_any_songs_and_gives_what_the_layers_give(model: LoadedModel, fresh: None) -> None:
    dit = deepcopy(model.dit)
    dit.compile_layers(backend="eager")
    for frames, conditions in (([10], [40]), ([140, 801], [20, 290]), ([3, 1, 600], [1, 9, 30]), ([512], [128])):
        songs = songs_of(dit, frames, conditions)
        for found, expected in zip(dit(*songs), model.dit(*songs), strict=True):
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1


@torch.inference_mode()
def test_songs_with_adapters_are_not_compiled_and_those_beside_them_are(model: LoadedModel, fresh: None) -> None:
    dit = deepcopy(model.dit)
    dit.compile_layers(backend="eager")
    songs = songs_of(dit, [30, 12, 40], [9, 5, 7])
    delta = LowRank(down=torch.ones(1, 64), up=torch.ones(64, 1))
    adapted = (Adaptation(deltas={"layers.1.self_attn.q_proj": delta}, scale=1.0),)
    for uses, num_programs in (((adapted,) * 3, 0), (((), adapted, ()), 1)):
        for found, expected in zip(dit(*songs, uses), model.dit(*songs, uses), strict=True):
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert counters["stats"]["unique_graphs"] == num_programs
    assert dit.is_compiled


@torch.inference_mode()
def test_where_the_compiler_fails_the_layers_run_as_they_are(
    model: LoadedModel, fresh: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel for this card")

    dit = deepcopy(model.dit)
    dit.compile_layers(backend=broken)
    songs = songs_of(dit, [30, 5], [9, 4])
    for _ in range(2):
        for found, expected in zip(dit(*songs), model.dit(*songs), strict=True):
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert capsys.readouterr().out.count("compile_failed") == 1


@torch.inference_mode()
def test_a_model_that_is_one_program_too_many_runs_as_it_is(
    model: LoadedModel, xl_model: LoadedModel, fresh: None, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler: Any = dynamo_config  # without types
    with compiler.patch(recompile_limit=1):
        for number, each in enumerate((model, xl_model)):
            dit = deepcopy(each.dit)
            dit.compile_layers(backend="eager")
            songs = songs_of(dit, [30, 5], [9, 4])
            for found, expected in zip(dit(*songs), each.dit(*songs), strict=True):
                torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
            assert dit.is_compiled is (number == 0)
    assert capsys.readouterr().out.count("compile_failed") == 1


class Counting:
    """A compiler that leaves programs as they are, and counts them."""

    def __init__(self) -> None:
        self.num_programs = 0

    def __call__(self, program: GraphModule, _: object) -> Callable[..., Any]:
        self.num_programs += 1
        return program.forward


async def test_no_song_pays_for_a_program_after_the_warm_up(
    model: LoadedModel, xl_model: LoadedModel, fresh: None
) -> None:
    compiler = Counting()
    models = [replace(each, dit=deepcopy(each.dit)) for each in (model, xl_model)]
    for each in models:
        each.dit.compile_layers(backend=compiler)
    engine = DitEngine(models, Worker("dit"))
    cards = list(map(card_of, models))
    serving = Serving(engine, models=cards)
    async with serving:
        await warm_up(serving.channel, cards)
        assert compiler.num_programs == 2  # the two have unlike widths
        for each, scale in product(models, (1.0, 3.0)):
            diffusion = replace(song_of(1, steps=1).diffusion, guidance=Guidance(scale=scale))
            for together in ([1], [600, 9, 40]):
                songs = [song_of(frames, steps=1, seed=3) for frames in together]
                wanted = [replace(song, model=each.model_fingerprint, diffusion=diffusion) for song in songs]
                await asyncio.gather(*(finish(engine, song) for song in wanted))
    engine.close()
    assert all(each.dit.is_compiled for each in models)
    assert compiler.num_programs == 2
