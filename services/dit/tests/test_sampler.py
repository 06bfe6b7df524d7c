"""Schedules, noise and steps."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soundstage_dit.sampler import draw_noise, euler, schedule


@pytest.mark.parametrize(
    ("shift", "times"),
    [
        (1.0, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]),
        (2.0, [1, 0.9333333, 0.8571429, 0.7692308, 0.6666667, 0.5454545, 0.4, 0.2222222, 0]),
        (3.0, [1, 0.9545455, 0.9, 0.8333333, 0.75, 0.6428571, 0.5, 0.3, 0]),
    ],
)
def test_eight_steps_have_the_published_times(shift: float, times: list[float]) -> None:
    assert schedule(8, shift) == pytest.approx(times, abs=1e-7)


def test_times_round_to_the_published_bfloat16_ones() -> None:
    rounded = torch.tensor(schedule(8, 3.0)).bfloat16().tolist()
    assert rounded == [1, 0.953125, 0.8984375, 0.83203125, 0.75, 0.64453125, 0.5, 0.30078125, 0]


@given(steps=st.integers(1, 20), shift=st.floats(1, 5))
def test_a_schedule_falls_from_one_to_zero(steps: int, shift: float) -> None:
    times = schedule(steps, shift)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    assert times == sorted(set(times), reverse=True)


@given(steps=st.integers(1, 20), shift=st.floats(1, 5))
def test_a_true_velocity_leads_to_the_data(steps: int, shift: float) -> None:
    noise, data = draw_noise(1, 5, 64), draw_noise(2, 5, 64)
    times, latents = schedule(steps, shift), noise
    for now, after in pairwise(times):
        latents = euler(latents, noise - data, now, after)
    torch.testing.assert_close(latents, data, atol=1e-5, rtol=0)  # up to 20 float32 additions


def test_a_seed_names_its_noise() -> None:
    assert torch.equal(draw_noise(7, 10, 64), draw_noise(7, 10, 64))
    assert not torch.equal(draw_noise(7, 10, 64), draw_noise(8, 10, 64))
    assert draw_noise(2**32 - 1, 1000, 64).std().item() == pytest.approx(1, abs=0.02)
