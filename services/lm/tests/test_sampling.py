import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundstage_lm.brief import Sampling
from soundstage_lm.sampling import draw, guide, penalize, uniform

PLAIN = Sampling(temperature=1.0, top_p=1.0)
# A song is made again from its seed, so these may not change with a library; they are Philox 4x64-10's own.
GOLDEN = [0.011546754286331562, 0.3035680343067586, 0.21185954403345741, 0.5023796042735054, 0.7943924743140365]
LOGITS = torch.tensor([0.0, 2.0, 1.0])  # probabilities 0.09, 0.665, 0.245


def outcomes(logits: torch.Tensor, sampling: Sampling, count: int = 1000) -> list[float]:
    drawn = torch.tensor([draw(logits, sampling, index / count) for index in range(count)])
    return (torch.bincount(drawn, minlength=len(logits)) / count).tolist()


def test_guidance_moves_away_from_the_unconditional() -> None:
    assert guide(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]), 2.0).tolist() == [3.0, -1.0]


def test_guidance_is_computed_in_float32() -> None:
    conditional, unconditional = torch.tensor([256.0]).bfloat16(), torch.tensor([1.0]).bfloat16()
    assert guide(conditional, unconditional, 2.0).tolist() == [511.0]  # bfloat16 would make it 512


def test_penalty_acts_on_written_tokens_only() -> None:
    logits, is_written = torch.tensor([2.0, -2.0, 2.0]), torch.tensor([True, True, False])
    assert penalize(logits, is_written, 2.0).tolist() == [1.0, -4.0, 2.0]


def test_draws_each_token_as_often_as_its_probability() -> None:
    # Evenly spaced numbers miss a probability by less than their spacing on either side.
    assert outcomes(LOGITS, PLAIN) == pytest.approx(LOGITS.softmax(0).tolist(), abs=0.002)


def test_temperature_divides_the_logits() -> None:
    sampling = replace(PLAIN, temperature=0.5)
    assert outcomes(LOGITS, sampling) == pytest.approx((LOGITS / 0.5).softmax(0).tolist(), abs=0.002)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert outcomes(LOGITS, replace(PLAIN, temperature=0.0)) == [0, 1, 0]


def test_top_k_keeps_that_many() -> None:
    assert outcomes(LOGITS, replace(PLAIN, top_k=2)) == pytest.approx([0, 0.731, 0.269], abs=0.002)


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.66, 1), (0.67, 2), (0.9, 2), (0.92, 3), (1.0, 3)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    assert sum(share > 0 for share in outcomes(LOGITS, replace(PLAIN, top_p=top_p))) == kept


def test_top_p_comes_after_temperature() -> None:
    # At temperature 0.5 the likeliest has 0.867; before it 0.665.
    assert outcomes(LOGITS, replace(PLAIN, temperature=0.5, top_p=0.8)) == [0, 1, 0]


def test_top_p_comes_after_top_k() -> None:
    # Of the two that top-k keeps the likeliest has 0.731; of all three 0.665.
    assert outcomes(LOGITS, replace(PLAIN, top_k=2, top_p=0.7)) == [0, 1, 0]


def test_the_smallest_temperature_takes_the_likeliest() -> None:
    assert outcomes(LOGITS, replace(PLAIN, temperature=5e-324), count=10) == [0, 1, 0]


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 60),
    top_p=st.floats(0, 1, exclude_min=True),
    number=st.floats(0, 1, exclude_max=True),
)
def test_draws_one_of_the_kept_whatever_the_options(
    logits: list[float], temperature: float, top_k: int, top_p: float, number: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    index = draw(torch.tensor(logits), sampling, number)
    better = sum(logit > logits[index] for logit in logits)
    assert better < (top_k or len(logits))


def test_numbers_depend_on_seed_phase_and_position_and_never_change() -> None:
    found = [uniform(0, 0, 0), uniform(1, 0, 0), uniform(0, 1, 0), uniform(0, 0, 1), uniform(2**32 - 1, 1, 2999)]
    assert found == GOLDEN


@settings(deadline=None)
@given(
    logits=st.lists(st.sampled_from([-2.0, -0.5, 0.0, -0.0, 0.25, 3.0]) | st.floats(-9, 9, width=32), min_size=1),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.05, 1),
    number=st.floats(0, 1, exclude_max=True),
)
def test_draws_what_sorting_everything_would(logits: list[float], top_k: int, top_p: float, number: float) -> None:
    scores = torch.tensor(logits)
    order = sorted(range(len(logits)), key=lambda index: -logits[index])[: top_k or None]  # stable: equals by index
    mass = [math.exp((float(scores[index]) - max(logits)) / 0.7) for index in order]
    sums = np.cumsum(mass)
    kept = next(place for place, total in enumerate(sums) if total >= top_p * sums[-1])
    drawn = next((place for place, total in enumerate(sums) if total > number * sums[kept]), kept)
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p)
    assert draw(scores, sampling, number) == order[min(drawn, kept)]


def test_a_nan_is_never_drawn() -> None:
    logits = torch.tensor([torch.nan, 0.0, torch.nan, 1.0, -torch.inf])
    assert {draw(logits, PLAIN, index / 100) for index in range(100)} == {1, 3}


def test_infinite_mass_is_drawn() -> None:
    assert {draw(torch.tensor([0.0, torch.inf, 1.0]), PLAIN, index / 100) for index in range(100)} == {1}
