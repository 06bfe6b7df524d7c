"""Steps and songs kept to what is free just then, on a card that others take memory of and give back."""

import asyncio
import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from soundstage_budget.need import velocity_bytes
from soundstage_dit.engine import DitEngine
from soundstage_dit.memory import estimate_bytes, tokens_that_fit
from soundstage_dit.model.dit import Dit
from soundstage_dit.residence import weight_bytes
from soundstage_dit.size import transformer_shape
from soundstage_dit.song import Diffusion, Edit, Guidance, Sampler, Song
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.worker import Worker

from .test_engine import Stepwise, finish, song_of

PLENTY = 1 << 40


def step_bytes(model: LoadedModel, tokens: int) -> int:
    """What the plan says a step of so many tokens takes."""
    shape = transformer_shape(model.dit.shape.stack)
    return velocity_bytes(shape, tokens=tokens, longest=tokens, itemsize=4, in_blocks=False)


@torch.inference_mode()
def joined_bytes(model: LoadedModel, song: Song) -> int:
    """What the song's conditions take in one layer, laid beside those of others."""
    return model.dit.remember(model.conditioner.encode(song))[0].nbytes


class Shared:
    """A card that others use too: what they leave, as a test says."""

    def __init__(self, model: LoadedModel, **limits: Any) -> None:
        self.free_bytes = PLENTY
        self.steps = Stepwise(model.dit)
        self.engine = DitEngine(
            [replace(model, dit=cast(Dit, self.steps))], Worker("dit"), free_bytes=lambda: self.free_bytes, **limits
        )

    async def let_through(self, steps: int) -> None:
        """Let steps be taken, and wait for the one after them."""
        for _ in range(steps):
            self.steps.allow(1)
            await self.steps.wait_for_step()


async def alone(model: LoadedModel, song: Song) -> NDArray[np.float32]:
    engine = DitEngine([model], Worker("dit"))
    latents = await finish(engine, song)
    engine.close()
    return latents


async def test_steps_have_the_songs_that_memory_is_free_for(
    model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    card = Shared(model)
    songs = [song_of(40, steps=5, seed=1)] * 8
    made = [asyncio.create_task(finish(card.engine, song)) for song in songs]
    await card.steps.wait_for_step()
    card.free_bytes = step_bytes(model, 60) + 3 * joined_bytes(model, songs[0])
    await card.let_through(4)
    card.free_bytes -= 1  # and one song has no room any more
    await card.let_through(2)
    card.free_bytes = PLENTY
    await card.let_through(1)
    card.steps.allow(100)
    found = await asyncio.gather(*made)
    card.engine.close()
    assert card.steps.batches[:8] == [8, 3, 3, 3, 3, 2, 2, 8]
    assert capsys.readouterr().out.count("memory_lowered_step") == 1
    for latents, song in zip(found, songs, strict=True):
        np.testing.assert_array_equal(latents, await alone(model, song))


async def test_a_song_alone_is_tried_whatever_is_free(model: LoadedModel) -> None:
    card = Shared(model)
    card.free_bytes = -1
    card.steps.allow(100)
    songs = [song_of(40, steps=2, seed=seed) for seed in range(2)]
    found = await asyncio.gather(*(finish(card.engine, song) for song in songs))
    card.engine.close()
    assert card.steps.batches == [1] * 4
    for latents, song in zip(found, songs, strict=True):
        np.testing.assert_array_equal(latents, await alone(model, song))


async def test_a_song_begins_when_there_is_memory_for_it_and_for_a_step_beside_it(model: LoadedModel) -> None:
    first, second = song_of(60, steps=12, seed=1), song_of(40, steps=6, seed=2)
    needed = estimate_bytes(second, model) + step_bytes(model, 30)  # the first one's step is the larger
    card = Shared(model)
    card.free_bytes = needed - 1
    order: list[int] = []

    async def note(song: Song) -> None:
        async for event in card.engine.denoise(song):
            if isinstance(event, int):
                order.append(song.seed)

    made = [asyncio.create_task(note(song)) for song in (first, second)]
    await card.steps.wait_for_step()
    await card.let_through(4)
    card.free_bytes = needed
    await card.let_through(1)
    card.free_bytes = step_bytes(model, 30) + joined_bytes(
        model, second
    )  # from now on one at a time, and they take turns
    card.steps.allow(100)
    await asyncio.gather(*made)
    card.engine.close()
    assert card.steps.batches[:6] == [1] * 5 + [2]
    assert order == [1] * 6 + [2] + [2, 1] * 5 + [1]


@pytest.mark.parametrize(
    "asked",
    [
        Diffusion(sampler=Sampler.HEUN, guidance=Guidance(scale=7.0)),
        Diffusion(guidance=Guidance(scale=7.0)),
    ],
)
async def test_a_song_that_asks_several_times_a_step_needs_room_for_one_time(
    model: LoadedModel, asked: Diffusion
) -> None:
    task = Edit(source_caption="", source_lyrics="", averages=8)
    many = replace(song_of(60, steps=2), diffusion=asked)
    if asked.sampler is Sampler.EULER:
        many = replace(many, task=task, source=np.zeros((60, 64), np.float32))
    other = song_of(40, steps=30, seed=2)
    at_once = 30 * (4 if many.task is task else 2)
    card = Shared(model)
    card.free_bytes = estimate_bytes(many, model) + step_bytes(model, at_once)
    made = [asyncio.create_task(finish(card.engine, song)) for song in (other, many)]
    await card.steps.wait_for_step()
    await card.let_through(4)
    card.steps.allow(1000)
    await asyncio.gather(*made)
    card.engine.close()
    # The other one has so many steps that it would have gone alone for long, had this one not begun beside it.
    assert max(card.steps.batches[:4]) > 1


@pytest.mark.parametrize("tokens", [1, 20, 7500])
def test_a_step_has_room_where_the_plan_says_so(model: LoadedModel, tokens: int) -> None:
    assert tokens_that_fit(model, step_bytes(model, tokens)) == tokens
    assert tokens_that_fit(model, math.inf) == math.inf


def test_two_layers_that_come_and_go_have_their_room(model: LoadedModel) -> None:
    on_card = replace(model, device=torch.device("cuda"))  # and its layers wait in the CPU's memory
    layers_bytes = sum(map(weight_bytes, model.dit.layers[:2]))
    assert layers_bytes > 0
    assert tokens_that_fit(on_card, step_bytes(model, 9) + layers_bytes) == 9
