"""Guidance: published numbers, diffusers' formula, and what a guide remembers."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from soundstage_dit.guidance import Estimate, Guide, as_long, by_angle, classifier_free
from soundstage_dit.sampler import cleaned, draw_noise
from soundstage_dit.song import Guidance, GuidanceMethod

ANGLES = [GuidanceMethod.ADG, GuidanceMethod.ADG_NORMED, GuidanceMethod.ADG_UNCLIPPED]


def estimate(seed: int, *, time: float = 0.5, is_guided: bool = True) -> Estimate:
    """Velocities as unlike one another as noise."""
    latents, conditional, unconditional = (draw_noise(3 * seed + offset, 6, 4) for offset in range(3))
    return Estimate(
        latents=latents, time=time, conditional=conditional, unconditional=unconditional if is_guided else None
    )


def guide(scale: float = 7.0, method: GuidanceMethod = GuidanceMethod.APG) -> Guide:
    """A guide of a new song."""
    return Guide(Guidance(scale=scale, method=method))


def at_angle(angle: float, length: float = 1.0) -> Tensor:
    """One frame of two channels, turned from the first channel."""
    return torch.tensor([[length * math.cos(angle), length * math.sin(angle)]])


def test_the_published_two_steps_of_apg() -> None:
    drawn = Estimate(
        latents=torch.zeros(2, 2),
        time=0.5,
        conditional=torch.tensor([[1.0, 0], [0, 2]]),
        unconditional=torch.tensor([[0.0, 1], [1, 0]]),
    )
    leader = guide(scale=7)
    torch.testing.assert_close(leader.guide([drawn])[0], torch.tensor([[1.0, -6], [-6, 2]]))
    torch.testing.assert_close(leader.guide([drawn])[0], torch.tensor([[1.0, -1.5], [-1.5, 2]]))


@given(scale=st.floats(1.01, 15), length=st.floats(0.1, 10))
def test_apg_is_that_of_diffusers_over_many_steps(scale: float, length: float) -> None:
    momentum, leader = MomentumBuffer(momentum=-0.75), guide(scale)
    for step in range(4):
        drawn = estimate(step)
        assert drawn.unconditional is not None
        conditional, unconditional = length * drawn.conditional, length * drawn.unconditional
        theirs = normalized_guidance(
            conditional[None],
            unconditional[None],
            guidance_scale=scale - 1,
            momentum_buffer=momentum,
            eta=0.0,
            norm_threshold=2.5,
            use_original_formulation=True,
            norm_dim=(1,),
        )[0]
        [ours] = leader.guide(
            [Estimate(latents=drawn.latents, time=0.5, conditional=conditional, unconditional=unconditional)]
        )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)  # of numbers up to 50


def test_apg_adds_nothing_along_the_conditional_velocity() -> None:
    drawn = estimate(1)
    [guided] = guide().guide([drawn])
    along = ((guided - drawn.conditional) * drawn.conditional).sum(0)
    torch.testing.assert_close(along, torch.zeros(4), atol=1e-5, rtol=0)


def test_the_momentum_rests_while_guidance_does() -> None:
    rested, straight = guide(), guide()
    first, second = estimate(1), estimate(2)
    for leader in (rested, straight):
        leader.guide([first])
    assert torch.equal(rested.guide([estimate(3, is_guided=False)])[0], estimate(3).conditional)
    assert torch.equal(rested.guide([second])[0], straight.guide([second])[0])


def test_the_momentum_counts_steps_and_not_second_looks() -> None:
    looked, straight = guide(scale=3), guide(scale=3)
    first, second = estimate(1), estimate(2)
    for leader in (looked, straight):
        leader.guide([first])
    assert second.unconditional is not None
    assert torch.equal(looked.correct(second), classifier_free(second.conditional, second.unconditional, 3))
    assert torch.equal(looked.guide([second])[0], straight.guide([second])[0])


def test_the_order_of_draws_is_no_matter() -> None:
    forwards, backwards = guide(), guide()
    first, second, then = estimate(1), estimate(2), estimate(3)
    one, other = forwards.guide([first, second])
    assert torch.equal(torch.stack([other, one]), torch.stack(backwards.guide([second, first])))
    assert torch.equal(forwards.guide([then])[0], backwards.guide([then])[0])


def test_draws_move_the_momentum_by_their_mean() -> None:
    drawn, alone = guide(), guide()
    first, second, then = estimate(1), estimate(2), estimate(3)
    assert first.unconditional is not None
    assert second.unconditional is not None
    drawn.guide([first, second])
    mean = Estimate(
        latents=first.latents,
        time=0.5,
        conditional=(first.conditional + second.conditional) / 2,
        unconditional=(first.unconditional + second.unconditional) / 2,
    )
    alone.guide([mean])
    torch.testing.assert_close(drawn.guide([then])[0], alone.guide([then])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("time", "is_guided"), [(0.19, False), (0.2, True), (0.5, True), (0.6, True), (0.61, False), (1.0, False)]
)
def test_the_interval_is_of_times_and_holds_its_ends(time: float, is_guided: bool) -> None:
    assert Guide(Guidance(scale=7, start=0.2, end=0.6)).applies(time) == is_guided


def test_a_scale_of_one_guides_nothing() -> None:
    assert not guide(scale=1).applies(0.5)
    assert guide(scale=1.1).applies(1.0)


@pytest.mark.parametrize("method", GuidanceMethod)
def test_without_a_second_velocity_the_first_is_left(method: GuidanceMethod) -> None:
    drawn = estimate(1, is_guided=False)
    leader = guide(method=method)
    assert torch.equal(leader.guide([drawn])[0], drawn.conditional)
    assert torch.equal(leader.correct(drawn), drawn.conditional)


def test_cfg_goes_on_from_the_unconditional() -> None:
    drawn, leader = estimate(1), guide(scale=3, method=GuidanceMethod.CFG)
    assert drawn.unconditional is not None
    expected = 3 * drawn.conditional - 2 * drawn.unconditional
    for velocity in (leader.guide([drawn])[0], leader.correct(drawn)):
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)


# Of unit frames at 0 and at an angle the guided one is cos(turn) (cos(angle), sin(angle)) + sin(turn) (0, 1).
@pytest.mark.parametrize(
    ("angle", "scale", "largest", "turn"),
    [
        (0.1, 3.0, 3.14 / 6, 0.2001),
        (1.0, 7.0, 3.14 / 6, 3.14 / 6),
        (1.0, 7.0, 3.14 / 3, 3.14 / 3),
        (1.0, 2.0, math.inf, 1.001),
        (0.0, 7.0, math.inf, 0.0),
    ],
)
def test_adg_turns_a_frame_by_its_angle(angle: float, scale: float, largest: float, turn: float) -> None:
    turned = by_angle(at_angle(angle), at_angle(0, length=2), scale, largest_angle=largest)
    expected = math.cos(turn) * at_angle(angle) + math.sin(turn) * at_angle(math.pi / 2)
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("method", "largest"),
    [
        (GuidanceMethod.ADG, 3.14 / 6),
        (GuidanceMethod.ADG_NORMED, 3.14 / 3),
        (GuidanceMethod.ADG_UNCLIPPED, math.inf),
    ],
)
def test_adg_leads_to_turned_data(method: GuidanceMethod, largest: float) -> None:
    drawn = estimate(1, time=0.4)
    assert drawn.unconditional is not None
    conditional = cleaned(drawn.latents, drawn.conditional, 0.4)
    turned = by_angle(conditional, cleaned(drawn.latents, drawn.unconditional, 0.4), 5, largest_angle=largest)
    expected = as_long(turned, conditional) if method is GuidanceMethod.ADG_NORMED else turned
    leader = guide(scale=5, method=method)
    for velocity in (leader.guide([drawn])[0], leader.correct(drawn)):
        torch.testing.assert_close(cleaned(drawn.latents, velocity, 0.4), expected, atol=1e-5, rtol=1e-5)


def test_normed_adg_keeps_the_length_of_every_channel() -> None:
    drawn = estimate(1)
    [velocity] = guide(method=GuidanceMethod.ADG_NORMED).guide([drawn])
    lengths = [cleaned(drawn.latents, each, drawn.time).norm(dim=0) for each in (velocity, drawn.conditional)]
    torch.testing.assert_close(lengths[0], lengths[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ANGLES)
def test_adg_is_finite_where_both_agree_or_vanish(method: GuidanceMethod) -> None:
    velocity = torch.cat([draw_noise(1, 2, 4), torch.zeros(2, 4)])
    drawn = Estimate(latents=torch.zeros(4, 4), time=0.5, conditional=velocity, unconditional=velocity)
    torch.testing.assert_close(guide(method=method).guide([drawn])[0], velocity, atol=1e-4, rtol=0)
