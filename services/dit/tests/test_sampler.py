"""Schedules, noise and steps."""

from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from soundstage_dit.sampler import (
    Purpose,
    band_weights,
    blend,
    bounded,
    cleaned,
    correct_bands,
    draw_noise,
    draw_noises,
    euler,
    inject,
    noised,
    rescale,
    retake,
    smoothed,
    start_from,
    switch_step,
)
from soundstage_dit.schedule import TURBO_TIMES, custom_times, nearest_turbo_times, schedule
from soundstage_dit.song import WaveletMode

falling_times = st.lists(st.floats(0.001, 1), min_size=1, max_size=20).map(lambda times: sorted(times, reverse=True))


def column(*values: float) -> Tensor:
    """Latents of one channel."""
    return torch.tensor(values, dtype=torch.float32)[:, None]


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


@given(steps=st.integers(1, 200), shift=st.floats(1, 5))
def test_a_schedule_falls_from_one_to_zero(steps: int, shift: float) -> None:
    times = schedule(steps, shift)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (1, 0)
    assert times == sorted(set(times), reverse=True)


def test_a_turbo_model_knows_the_twenty_published_times() -> None:
    published = [1, 0.9545455, 0.9333333, 0.9, 0.875, 0.8571429, 0.8333333, 0.7692308, 0.75, 0.6666667]
    published += [0.6428571, 0.625, 0.5454545, 0.5, 0.4, 0.375, 0.3, 0.25, 0.2222222, 0.125]
    assert pytest.approx(published, abs=1e-7) == TURBO_TIMES


def test_times_of_ones_own_move_to_the_nearest_a_turbo_model_knows() -> None:
    times = nearest_turbo_times([0.97, 0.76, 0.615, 0.5, 0.395, 0.28, 0.18, 0.085, 0])
    assert times == pytest.approx([0.9545455, 0.7692308, 0.625, 0.5, 0.4, 0.3, 0.2222222, 0.125, 0], abs=1e-7)


@given(times=falling_times)
def test_moved_times_still_fall_and_none_is_further_than_it_need_be(times: list[float]) -> None:
    *moved, end = nearest_turbo_times(times)
    assert end == 0
    assert moved == sorted(moved, reverse=True)
    for time, known in zip(times, moved, strict=True):
        assert abs(time - known) == min(abs(time - other) for other in TURBO_TIMES)


@given(times=falling_times, zeros=st.integers(0, 3))
def test_times_of_ones_own_stay_as_they_are_and_end_in_one_zero(times: list[float], zeros: int) -> None:
    assert custom_times(times + [0.0] * zeros) == [*times, 0.0]


@given(steps=st.integers(1, 20), shift=st.floats(1, 5))
def test_a_true_velocity_leads_to_the_data(steps: int, shift: float) -> None:
    noise, data = draw_noise(1, 5, 64), draw_noise(2, 5, 64)
    times, latents = schedule(steps, shift), noise
    for now, after in pairwise(times):
        latents = euler(latents, noise - data, now, after)
    torch.testing.assert_close(latents, data, atol=1e-5, rtol=0)  # up to 20 float32 additions


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_are_those_of_diffusers(shift: float) -> None:
    times, latents = schedule(8, shift), draw_noise(1, 5, 64)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    scheduler.set_timesteps(sigmas=times[:-1])
    assert scheduler.timesteps.tolist() == pytest.approx(times[:-1], abs=1e-7)
    theirs: Tensor = latents
    for step, (now, after) in enumerate(pairwise(times)):
        velocity = draw_noise(step, 5, 64)
        latents = euler(latents, velocity, now, after)
        theirs = scheduler.step(velocity, scheduler.timesteps[step], theirs, return_dict=False)[0]
    torch.testing.assert_close(latents, theirs, atol=1e-6, rtol=1e-6)


@given(time=st.floats(0, 1))
def test_noised_data_and_its_velocity_give_the_data(time: float) -> None:
    noise, data = draw_noise(1, 5, 64), draw_noise(2, 5, 64)
    torch.testing.assert_close(cleaned(noised(data, noise, time), noise - data, time), data, atol=1e-6, rtol=0)


def test_a_seed_names_its_noise() -> None:
    assert torch.equal(draw_noise(7, 10, 64), draw_noise(7, 10, 64))
    assert not torch.equal(draw_noise(7, 10, 64), draw_noise(8, 10, 64))
    assert draw_noise(2**32 - 1, 1000, 64).std().item() == pytest.approx(1, abs=0.02)


def test_every_purpose_and_every_seed_has_noises_of_its_own() -> None:
    streams = [draw_noise(seed, 10, 64) for seed in (0, 1, 2)]
    for seed in (0, 1, 2):
        for purpose in Purpose:
            streams += islice(draw_noises(seed, purpose, 10, 64), 3)
    products = torch.corrcoef(torch.stack(streams).flatten(1)) - torch.eye(len(streams))
    assert products.abs().max() < 0.2  # 640 independent numbers correlate by 0.04 at random


def test_noises_are_the_same_each_time() -> None:
    first = list(islice(draw_noises(7, Purpose.STEP, 4, 8), 3))
    again = list(islice(draw_noises(7, Purpose.STEP, 4, 8), 3))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_half_a_retake_is_both_noises_alike() -> None:
    noise, second = draw_noise(1, 4, 8), draw_noise(2, 4, 8)
    torch.testing.assert_close(retake(noise, second, 0.5), 0.7071068 * (noise + second), atol=1e-6, rtol=0)


def test_a_retake_leaves_one_noise_and_reaches_the_other() -> None:
    noise, second = draw_noise(1, 4, 8), draw_noise(2, 4, 8)
    assert torch.equal(retake(noise, second, 0), noise)
    torch.testing.assert_close(retake(noise, second, 1), second, atol=1e-6, rtol=0)


@given(variance=st.floats(0, 1))
def test_a_retake_has_the_spread_of_noise(variance: float) -> None:
    mixed = retake(draw_noise(1, 500, 64), draw_noise(2, 500, 64), variance)
    assert mixed.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("strength", "time", "steps"), [(0.25, 0.75, 4), (0.5, 0.5, 2), (1.0, 0.3, 1), (0.1, 0.9, 6)])
def test_a_cover_starts_at_the_time_nearest_to_its_noise(strength: float, time: float, steps: int) -> None:
    noise, source = draw_noise(1, 4, 8), draw_noise(2, 4, 8)
    times = schedule(8, 3.0)
    latents, left = start_from(source, noise, times, strength)
    assert left == times[-steps - 1 :]
    torch.testing.assert_close(latents, time * noise + (1 - time) * source, atol=1e-6, rtol=0)


def test_a_cover_without_noise_strength_starts_from_noise() -> None:
    noise, source = draw_noise(1, 4, 8), draw_noise(2, 4, 8)
    latents, left = start_from(source, noise, [0.5, 0.2, 0], 0)
    assert torch.equal(latents, noise)
    assert left == [0.5, 0.2, 0]


@pytest.mark.parametrize(("strength", "step"), [(0.5, 4), (0.3, 2), (0.35, 2), (0.0, 0), (1.0, 8)])
def test_a_cover_switches_after_its_share_of_the_steps(strength: float, step: int) -> None:
    assert switch_step(8, strength) == step


def test_a_long_velocity_is_shortened_and_a_short_one_left() -> None:
    latents, velocity = column(3, 4), column(6, 8)  # lengths 5 and 10
    torch.testing.assert_close(bounded(velocity, latents, 0.5), column(1.5, 2))
    assert torch.equal(bounded(velocity, latents, 2.5), velocity)
    assert torch.equal(bounded(velocity, latents, 0), velocity)
    assert torch.equal(bounded(column(0, 0), column(0, 0), 1), column(0, 0))


def test_the_velocity_before_is_mixed_in() -> None:
    torch.testing.assert_close(smoothed(column(1, 2), column(5, 6), 0.25), column(2, 3))
    assert torch.equal(smoothed(column(1, 2), None, 0.25), column(1, 2))
    assert torch.equal(smoothed(column(1, 2), column(5, 6), 0), column(1, 2))


# Of latents (1, 3) and data (0, 1) the difference is 1.5 in the low band, -0.5 and 0.5 in the high.
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("double", (1 + 0.025 * 1.5 - 0.01 * 0.5, 3 + 0.025 * 1.5 + 0.01 * 0.5)),
        ("low", (1 + 0.025 * 1.5, 3 + 0.025 * 1.5)),
        ("high", (1 - 0.025 * 0.5, 3 + 0.025 * 0.5)),
        ("pixel", (1 + 0.05, 3 + 0.05 * 2)),
    ],
)
def test_a_wavelet_mode_corrects_its_bands(mode: WaveletMode, expected: tuple[float, float]) -> None:
    weights = band_weights(mode, 0.5, 0.05, 0.02)
    torch.testing.assert_close(correct_bands(column(1, 3), column(0, 1), *weights), column(*expected))


def test_the_published_wavelet_correction() -> None:
    corrected = correct_bands(column(1, 3), column(0, 1), *band_weights("double", 0.5, 0.05, 0.02))
    torch.testing.assert_close(corrected, column(1.0325, 3.0425))


def test_bands_trade_places_as_time_falls() -> None:
    assert band_weights("double", 0.75, 0.1, 0.2) == pytest.approx((0.075, 0.05))
    assert band_weights("high", 0.75, 0.1, 0.2) == pytest.approx((0, 0.025))


def test_an_odd_last_frame_is_paired_with_zeros() -> None:
    corrected = correct_bands(column(1, 3, 2), column(0, 1, 1), 0.2, 0.4)
    torch.testing.assert_close(corrected, column(1.1, 3.5, 2 + 0.2 * 0.5 + 0.4 * 0.5))


@given(frames=st.integers(1, 9), weight=st.floats(0, 1))
def test_both_bands_alike_are_the_latents_themselves(frames: int, weight: float) -> None:
    latents, data = draw_noise(1, frames, 4), draw_noise(2, frames, 4)
    expected = latents + weight * (latents - data)
    torch.testing.assert_close(correct_bands(latents, data, weight, weight), expected, atol=1e-6, rtol=0)


def test_a_source_is_put_back_outside_of_its_window() -> None:
    latents, source, noise = column(1, 2, 3, 4), column(10, 20, 30, 40), column(2, 2, 2, 2)
    torch.testing.assert_close(inject(latents, source, noise, 0.5, 1, 3), column(6, 2, 3, 21))
    assert torch.equal(inject(latents, source, noise, 0.0, 1, 3), column(10, 2, 3, 40))


def test_the_published_blend() -> None:
    weights = blend(torch.ones(11, 1), torch.zeros(11, 1), 4, 7, 3)
    torch.testing.assert_close(weights, column(0, 0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0))


def test_a_ramp_ends_with_the_song() -> None:
    weights = blend(torch.ones(6, 1), torch.zeros(6, 1), 1, 4, 9)
    torch.testing.assert_close(weights, column(0.5, 1, 1, 1, 2 / 3, 1 / 3))


@given(start=st.integers(0, 9), length=st.integers(1, 10), ramp=st.integers(0, 12))
def test_a_blend_keeps_its_window_and_all_that_is_equal(start: int, length: int, ramp: int) -> None:
    end = min(start + length, 10)
    latents, source = draw_noise(1, 10, 4), draw_noise(2, 10, 4)
    blended = blend(latents, source, start, end, ramp)
    assert torch.equal(blended[start:end], latents[start:end])
    assert torch.equal(blended[: max(0, start - ramp)], source[: max(0, start - ramp)])
    assert torch.equal(blended[end + ramp :], source[end + ramp :])
    assert torch.equal(blend(source, source, start, end, ramp), source)


def test_latents_are_rescaled_before_they_are_shifted() -> None:
    assert torch.equal(rescale(column(1, 2), 3, 0.5), column(3.5, 6.5))
    assert torch.equal(rescale(column(0.1), 1, 0), column(0.1))
