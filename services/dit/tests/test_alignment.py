"""Align: arrays with a known answer, a tiny model over real gRPC, and what is forgotten."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from soundstage.stage.v1.dit_service_pb2 import AlignRequest, AlignResponse, DenoiseRequest, DenoiseSetup
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage_dit.adapters import Loan
from soundstage_dit.alignment import (
    Alignment,
    Line,
    Matrix,
    Path,
    UncalibratedError,
    combine,
    find_heads,
    find_lines,
    find_sung,
    score_attention,
    sharpen,
    time_lines,
    warp,
)
from soundstage_dit.engine import DitEngine
from soundstage_dit.handles import Keepsake, Keepsakes, SongForgottenError
from soundstage_dit.model.dit import Dit
from soundstage_dit.song import Diffusion, Song
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import read_details
from soundstage_runtime.worker import Worker

from .conftest import Serving

if TYPE_CHECKING:
    from soundstage.stage.v1.dit_service_pb2_grpc import DitServiceAsyncStub

LYRICS = "[verse]\nhello world\n\nand あ good-bye"

costs = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-1, 1, width=16))
weights = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(0, 1, width=16))


def cheapest(cost: Matrix) -> float:
    """The least sum over all paths, each of them tried."""
    tokens, frames = cost.shape

    def rest(token: int, frame: int) -> float:
        here = float(cost[token, frame])
        if (token, frame) == (tokens - 1, frames - 1):
            return here
        steps = ((token + 1, frame + 1), (token + 1, frame), (token, frame + 1))
        return here + min(rest(*step) for step in steps if step[0] < tokens and step[1] < frames)

    return rest(0, 0)


def cell_by_cell(cost: Matrix) -> list[tuple[int, int]]:
    """The path by the rule itself, ties included."""
    tokens, frames = cost.shape
    sums = np.full((tokens + 1, frames + 1), np.inf)
    sums[0, 0] = 0
    steps: dict[tuple[int, int], tuple[int, int]] = {}
    for frame in range(frames):
        for token in range(tokens):
            across, down, along = sums[token, frame], sums[token, frame + 1], sums[token + 1, frame]
            step, before = (0, 1), along
            if across < min(down, along):
                step, before = (1, 1), across
            elif down < min(across, along):
                step, before = (1, 0), down
            steps[token, frame] = step
            sums[token + 1, frame + 1] = before + float(cost[token, frame])
    path = [(tokens - 1, frames - 1)]
    while path[-1] != (0, 0):
        token, frame = path[-1]
        path.append((token - steps[path[-1]][0], frame - steps[path[-1]][1]))
    return path[::-1]


def pairs(path: Path) -> list[tuple[int, int]]:
    return list(zip(path[0].tolist(), path[1].tolist(), strict=True))


@given(costs)
def test_a_path_is_the_one_that_the_rule_gives_cell_by_cell(cost: Matrix) -> None:
    assert pairs(warp(cost)) == cell_by_cell(cost)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_without_ties_no_path_is_cheaper(tokens: int, frames: int, seed: int) -> None:
    cost = np.random.default_rng(seed).standard_normal((tokens, frames)).astype(np.float32)
    rows, columns = warp(cost)
    assert cost[rows, columns].sum(dtype=np.float64) == pytest.approx(cheapest(cost), abs=1e-9)


def test_ties_go_along_the_frames() -> None:
    assert pairs(warp(np.zeros((3, 4), np.float32))) == [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]


def attention_to(frames: list[tuple[int, int]], num_frames: int) -> Matrix:
    """Attention of tokens that are each sung in their own frames, and hum a little everywhere."""
    attention = np.full((len(frames), num_frames), 0.01, np.float32)
    for token, (first, end) in enumerate(frames):
        attention[token, first:end] = 0.9
    return attention


def test_lines_are_timed_by_the_frames_that_attend_to_them() -> None:
    # Tokens of 5 frames each; the second line begins after a pause in which nobody sings.
    frames = [(5, 10), (10, 15), (15, 20), (40, 45), (45, 50), (50, 55)]
    path = warp(-combine([sharpen(attention_to(frames, 60))] * 2))
    tokens = ["la ", "la", "\n", "lo ", "lo ", "lo"]
    spans = find_lines(tokens)
    assert spans == [slice(0, 3), slice(3, 6)]
    first, second = time_lines([("la la", spans[0]), ("lo lo lo", spans[1])], path, frame_s=0.08)
    # Each token's share begins and ends where it is attended to; the pause may go to either of its neighbours.
    assert (first.start_s, first.text) == (0.0, "la la")
    assert 19 * 0.08 <= first.end_s <= second.start_s <= 40 * 0.08
    assert second.end_s == pytest.approx(59 * 0.08)


def test_times_are_those_of_the_steps_of_the_path() -> None:
    path = (np.array([0, 0, 1, 2, 2]), np.array([0, 1, 2, 2, 3]))
    lines = time_lines([("a", slice(0, 1)), ("b", slice(1, 3))], path, frame_s=1 / 3)
    assert lines == (Line(text="a", start_s=0.0, end_s=0.333), Line(text="b", start_s=0.667, end_s=1.0))


def test_heads_are_sharpened_as_the_formula_says() -> None:
    attention = np.random.default_rng(0).random((7, 10), np.float32) * 8
    heads = torch.from_numpy(np.stack([attention, attention[::-1].copy()]))
    kept = heads.softmax(-1) * heads.softmax(-2)
    for axis in (-1, -2):
        kept = (kept - 2 * kept.quantile(0.5, dim=axis, keepdim=True)).relu()
    kept = kept**2
    expected = ((kept - kept.mean()) / (kept.std(unbiased=False) + 1e-9)).mean(0)
    ours = combine([sharpen(head.numpy()) for head in heads])
    assert expected.max() > 1
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@given(weights, st.data())
def test_a_score_is_between_nothing_and_one(attention: Matrix, data: st.DataObject) -> None:
    is_sung = data.draw(arrays(np.bool_, len(attention)))
    assert 0 <= score_attention([attention], is_sung) <= 1


def test_a_song_that_follows_its_lyrics_scores_better_than_one_that_does_not() -> None:
    frames = [(index * 10, index * 10 + 10) for index in range(6)]
    sung = np.ones(6, np.bool_)
    followed = attention_to(frames, 60)
    # The path goes by 60 cells of energy, and by a corner without any wherever the token changes.
    assert score_attention([followed], sung) == round(60 / 65, 4)
    assert score_attention([followed[::-1]], sung) == 0  # no centre comes after the one before it
    missing = followed.copy()
    missing[2:4] = 0.01
    assert score_attention([missing], sung) == round((4 / 6) ** 2 * 40 / 65, 4)
    # Tokens of tags need not be sung.
    assert score_attention([missing], np.array([1, 1, 0, 0, 1, 1], np.bool_)) == round(40 / 65, 4)
    assert score_attention([np.full((6, 60), 0.3, np.float32)], sung) == 0


def test_tags_are_not_sung() -> None:
    tokens = ["[", "verse", "]", "\n", "la", " [ah]", " la", "[a", "\n", "b]", "!"]
    assert find_sung(tokens).tolist() == [False] * 3 + [True, True, False, True] + [False] * 3 + [True]
    assert find_lines(["a", "\n\n", "b"]) == [slice(0, 2), slice(2, 3)]
    assert find_lines(["a\n"]) == [slice(0, 1)]
    assert find_lines([]) == []


def test_heads_are_known_for_the_2b_models_alone() -> None:
    assert find_heads(24, 16) == {2: (6,), 3: (10, 11), 4: (3,), 5: (8, 9), 6: (8,)}
    with pytest.raises(UncalibratedError, match="32 layers of 32 heads"):
        find_heads(32, 32)
    with pytest.raises(UncalibratedError, match=r"config\.json has lyric_alignment_heads"):
        find_heads(4, 4)
    assert find_heads(32, 32, {3: (1,)}) == {3: (1,)}


@torch.inference_mode()
def test_attention_is_what_diffusers_layers_mix_by(model: LoadedModel, pipeline: AceStepPipeline) -> None:
    # The mix of a head is its weights times the values; so with the head's weights known, the mix is too.
    source = torch.Generator().manual_seed(0)
    latents, context = (torch.randn(31, width, generator=source) for width in (64, 128))
    conditions = torch.randn(9, 64, generator=source)
    memory = model.dit.remember(conditions)
    mixes: list[torch.Tensor] = []

    def note(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        mixes.extend(given)

    time = torch.tensor([0.125])
    with pipeline.transformer.layers[1].cross_attn.to_out[0].register_forward_pre_hook(note):
        pipeline.transformer(
            hidden_states=latents[None],
            timestep=time,
            timestep_r=time,
            encoder_hidden_states=conditions[None],
            context_latents=context[None],
        )
    # Layers that are not needed need not be remembered.
    seen = model.dit.attention(latents, 0.125, context, memory[:2], heads={1: (3, 0)}, conditions=slice(0, 9))
    mixed = mixes[0][0].unflatten(-1, (4, 16))
    for head, weights in zip((3, 0), seen, strict=True):
        assert weights.shape == (9, 16)
        torch.testing.assert_close(weights.sum(0), torch.ones(16))
        torch.testing.assert_close(weights.T @ memory[1, 1, head // 2], mixed[:, head], atol=1e-5, rtol=1e-5)


def test_lyric_tokens_leave_out_what_is_around_the_lyrics(model: LoadedModel) -> None:
    tokens = model.conditioner.lyric_tokens(Song(caption="", lyrics=LYRICS, num_frames=1, seed=0, language="en"))
    assert tokens.places.start == len("# Languages\nen\n\n# Lyric\n")  # of the tiny tokenizer, which has bytes alone
    assert tokens.places.stop - tokens.places.start == len(tokens.texts) == len(LYRICS.encode())
    assert [text for text, _ in tokens.lines] == ["[verse]", "hello world", "and あ good-bye"]
    assert [span.start for _, span in tokens.lines] == [0, 8, 21]


def test_long_lyrics_end_where_the_model_stops_reading(model: LoadedModel) -> None:
    tokens = model.conditioner.lyric_tokens(Song(caption="", lyrics="la\n" * 1000, num_frames=1, seed=0))
    assert tokens.places.stop == 2047  # the last of the 2048 ends the prompt
    assert len(tokens.lines) == -(-len(tokens.texts) // 3)


def setup_of(**fields: object) -> DenoiseSetup:
    """A short song, with `fields` set."""
    setup = DenoiseSetup(caption="a calm piano", lyrics=LYRICS, latent_frames=101, seed=1)
    setup.MergeFrom(DenoiseSetup(options=DiffusionOptions(steps=2)))
    setup.MergeFrom(DenoiseSetup(**fields))  # pyright: ignore[reportArgumentType]
    return setup


async def make(stub: "DitServiceAsyncStub", setup: DenoiseSetup) -> str:
    """Make a song; returns its handle."""
    *_, last = [response async for response in stub.Denoise(iter([DenoiseRequest(setup=setup)]))]
    assert last.HasField("done")
    return last.done.handle


async def test_a_song_is_aligned_by_its_handle(engine: DitEngine) -> None:
    async with Serving(engine) as stub:
        first, second = await make(stub, setup_of()), await make(stub, setup_of(lyrics="lo\nlo", latent_frames=40))
        aligned: AlignResponse = await stub.Align(AlignRequest(handle=first))
        again: AlignResponse = await stub.Align(AlignRequest(handle=first))
        other: AlignResponse = await stub.Align(AlignRequest(handle=second))
    assert first != second
    assert aligned == again
    assert [line.text for line in aligned.lines] == ["[verse]", "hello world", "and あ good-bye"]
    times = [time for line in aligned.lines for time in (line.start_s, line.end_s)]
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] <= 101 / 25
    assert 0 < aligned.score <= 1
    assert 0 < aligned.plan_score <= 1
    assert aligned.plan_score != aligned.score
    assert [line.text for line in other.lines] == ["lo", "lo"]


async def test_a_song_without_lyrics_has_no_lines(engine: DitEngine) -> None:
    async with Serving(engine) as stub:
        handle = await make(stub, setup_of(latent_frames=1, options=DiffusionOptions(steps=1)))
        assert (await stub.Align(AlignRequest(handle=handle))).lines
        empty = DenoiseSetup(latent_frames=1, options=DiffusionOptions(steps=1))
        assert await stub.Align(AlignRequest(handle=await make(stub, empty))) == AlignResponse()


async def test_a_handle_that_nothing_is_kept_under_is_refused(engine: DitEngine) -> None:
    async with Serving(engine) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Align(AlignRequest(handle="gone"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert read_details(caught.value).reason == "SONG_FORGOTTEN"
    assert "'gone'" in (caught.value.details() or "")


class Listening:
    """Makes songs of silence at once, and never comes to an end of aligning them."""

    def __init__(self) -> None:
        self.began, self.ended = asyncio.Event(), asyncio.Event()

    async def denoise(self, song: Song, adapters: Loan) -> AsyncGenerator[int | NDArray[np.float32]]:
        yield np.zeros((song.num_frames, 64), np.float32)

    async def tokenize(
        self, latents: AsyncIterator[NDArray[np.float32]], model: str
    ) -> AsyncGenerator[NDArray[np.int64]]:
        async for _ in latents:
            yield np.zeros(1, np.int64)

    async def align(self, song: Song, latents: NDArray[np.float32], adapters: Loan) -> Alignment:
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()
        raise AssertionError("nothing sets the event")


async def test_cancelling_ends_an_alignment_and_frees_its_place() -> None:
    listening = Listening()
    serving = Serving(listening, max_in_flight=1)
    async with serving as stub:
        call = stub.Align(AlignRequest(handle=await make(stub, setup_of())))
        await asyncio.wait_for(listening.began.wait(), timeout=5)
        call.cancel()
        await asyncio.wait_for(listening.ended.wait(), timeout=5)
        assert await make(stub, setup_of())
        assert serving.admission.in_flight == 0


class Looks:
    """A transformer that notes the times it is looked at for."""

    def __init__(self, dit: Dit) -> None:
        self.times: list[float] = []
        self.shape, self.remember, self._dit = dit.shape, dit.remember, dit

    def attention(self, latents: torch.Tensor, time: float, *others: Any, **options: Any) -> list[torch.Tensor]:
        self.times.append(time)
        return self._dit.attention(latents, time, *others, **options)


def keepsake(num_frames: int = 10_000, **fields: object) -> Keepsake:
    song = Song(caption="", lyrics="", num_frames=num_frames, seed=0, **fields)  # pyright: ignore[reportArgumentType]
    return Keepsake(song=song, latents=np.zeros((num_frames, 64), np.float32), adapters=Loan([]))


def test_the_songs_that_were_asked_for_least_recently_are_forgotten() -> None:
    one = keepsake()
    kept = Keepsakes(max_bytes=2 * one.size_bytes)
    first, second = kept.keep(one), kept.keep(one)
    assert kept.find(first) is one
    third = kept.keep(one)
    assert kept.size_bytes == 2 * one.size_bytes
    with pytest.raises(SongForgottenError):
        kept.find(second)
    assert kept.find(first) is kept.find(third) is one


def test_sources_and_references_count_among_the_bytes_of_a_song() -> None:
    plain, source = keepsake(), np.zeros((10_000, 64), np.float32)
    assert plain.size_bytes >= plain.latents.nbytes
    assert keepsake(source=source, references=(source, source)).size_bytes == plain.size_bytes + 3 * source.nbytes


async def test_the_plan_is_scored_by_noise_alone_whatever_was_made(engine: DitEngine) -> None:
    song = Song(caption="", lyrics=LYRICS, num_frames=50, seed=0)
    made = [np.random.default_rng(seed).standard_normal((50, 64)).astype(np.float32) for seed in (0, 1)]
    first, second = [await engine.align(song, latents) for latents in made]
    assert first.plan_score == second.plan_score
    assert first.score != second.score
    coded = await engine.align(replace(song, codes=tuple(range(10))), np.zeros((50, 64), np.float32))
    assert coded.plan_score != first.plan_score


async def test_alignments_are_made_one_at_a_time(model: LoadedModel) -> None:
    looks = Looks(model.dit)
    engine = DitEngine([replace(model, dit=cast(Dit, looks))], Worker("dit"))
    song = Song(caption="", lyrics=LYRICS, num_frames=50, seed=0)
    made = [engine.align(replace(song, seed=seed), np.ones((50, 64), np.float32)) for seed in range(3)]
    await asyncio.gather(*made)
    engine.close()
    # The noise of the plan, then the song: were two at work, two plans would be looked at first.
    assert looks.times == [1.0, 0.125] * 3


async def test_latents_are_aligned_as_the_model_made_them(engine: DitEngine) -> None:
    made = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    song = Song(caption="", lyrics=LYRICS, num_frames=50, seed=0)
    changed = Song(
        caption="", lyrics=LYRICS, num_frames=50, seed=0, diffusion=Diffusion(latent_shift=3.0, latent_rescale=2.0)
    )
    assert await engine.align(song, made) == await engine.align(changed, made * 2 + 3)
