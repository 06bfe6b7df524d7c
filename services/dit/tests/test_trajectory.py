"""Whole ways from noise to latents, through velocity fields whose ends are known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from soundstage_dit.guidance import Estimate, Guide, classifier_free
from soundstage_dit.sampler import (
    Purpose,
    band_weights,
    blend,
    correct_bands,
    draw_noise,
    draw_noises,
    euler,
    noised,
    retake,
)
from soundstage_dit.schedule import schedule
from soundstage_dit.song import (
    Cover,
    Diffusion,
    Edit,
    Guidance,
    GuidanceMethod,
    Repaint,
    Retake,
    Sampler,
    Song,
    Task,
    TextToMusic,
    Wavelet,
)
from soundstage_dit.trajectory import Conditions, Evaluation, Prepared, Query, trajectory

FRAMES, CHANNELS = 10, 4
DATA, OTHER = draw_noise(101, FRAMES, CHANNELS), draw_noise(102, FRAMES, CHANNELS)
SEED = 7
START = draw_noise(SEED, FRAMES, CHANNELS)

Field = Callable[[Query], Tensor]


def conditions() -> Conditions:
    """Conditions that are told apart only by which they are."""
    return Conditions(context=torch.zeros(FRAMES, 2 * CHANNELS), memory=torch.zeros(0))


PREPARED = Prepared(
    channels=CHANNELS,
    conditional=conditions(),
    unconditional=conditions(),
    words=conditions(),
    words_unconditional=conditions(),
    told=conditions(),
    source=DATA,
)
EVERY = (
    PREPARED.conditional,
    PREPARED.unconditional,
    PREPARED.words,
    PREPARED.words_unconditional,
    PREPARED.told,
)


def song(diffusion: Diffusion | None = None, task: Task | None = None, seed: int = SEED) -> Song:
    """A song of a task, by default from words."""
    return Song(
        caption="",
        lyrics="",
        num_frames=FRAMES,
        seed=seed,
        diffusion=diffusion or Diffusion(),
        task=task or TextToMusic(),
    )


def play(asked: Song, field: Field, prepared: Prepared = PREPARED) -> tuple[Tensor, list[Evaluation]]:
    """Answer a trajectory by a field; return its end and what it asked for."""
    way, evaluations = trajectory(asked, prepared), list[Evaluation]()
    try:
        evaluations.append(next(way))
        while True:
            evaluations.append(way.send([field(query) for query in evaluations[-1].queries]))
    except StopIteration as end:
        return end.value, evaluations


def asked_under(evaluations: Sequence[Evaluation]) -> list[list[int]]:
    """Name the conditions of each evaluation by their place in EVERY."""
    return [
        [next(place for place, each in enumerate(EVERY) if each is query.conditions) for query in evaluation.queries]
        for evaluation in evaluations
    ]


def steps_done(evaluations: Sequence[Evaluation]) -> list[int]:
    """List the steps behind each evaluation."""
    return [evaluation.steps_done for evaluation in evaluations]


def towards(data: Tensor) -> Field:
    """Lead straight to data, from wherever latents are."""
    return lambda query: (query.latents - data) / query.time


def bent(query: Query) -> Tensor:
    """Lead along curves, other ones under each of the conditions."""
    [[place]] = asked_under([Evaluation(steps_done=0, queries=[query])])
    return torch.tanh(query.latents * (1 + 0.3 * place)) + query.time * torch.linspace(-1, 1, CHANNELS) * (place + 1)


def spread(query: Query) -> Tensor:
    """Lead noise to data that is noise of half its size: the way is known at every time."""
    time, variance = query.time, 0.25
    return query.latents * (time - (1 - time) * variance) / (time**2 + (1 - time) ** 2 * variance)


def diffusion(steps: int = 6, shift: float = 2.0, **changes: object) -> Diffusion:
    """Some steps with some changes."""
    return replace(Diffusion(times=tuple(schedule(steps, shift))), **changes)


TASKS: dict[str, Task] = {
    "words": TextToMusic(),
    "cover": Cover(strength=0.5, noise_strength=0.3),
    "repaint": Repaint(start=3, end=7, injection=0.5, blend_frames=2),
    "edit": Edit(source_caption="", source_lyrics="", start=0.2, end=0.8, averages=2),
}


@given(steps=st.integers(1, 20), shift=st.floats(1, 5), sampler=st.sampled_from(Sampler))
def test_every_sampler_reaches_the_data(steps: int, shift: float, sampler: Sampler) -> None:
    latents, evaluations = play(song(diffusion(steps, shift, sampler=sampler)), towards(DATA))
    torch.testing.assert_close(latents, DATA, atol=1e-4, rtol=0)  # noise is left over by rounding of times alone
    assert len(evaluations) == (2 * steps - 1 if sampler is Sampler.HEUN else steps)
    assert steps_done(evaluations)[-1] == steps - 1


def test_a_plain_song_takes_plain_steps_to_the_bit() -> None:
    asked = song(diffusion())
    latents = START
    for time, next_time in pairwise(asked.diffusion.times):
        query = Query(latents=latents, time=time, conditions=PREPARED.conditional)
        latents = euler(latents, bent(query), time, next_time)
    found, evaluations = play(asked, bent)
    assert torch.equal(found, latents)
    assert asked_under(evaluations) == [[0]] * 6
    assert steps_done(evaluations) == list(range(6))


def test_heun_looks_ahead_in_all_steps_but_the_last() -> None:
    asked = song(diffusion(3, sampler=Sampler.HEUN))
    _, evaluations = play(asked, bent)
    first, second, third, _ = asked.diffusion.times
    assert [evaluation.queries[0].time for evaluation in evaluations] == [first, second, second, third, third]
    assert steps_done(evaluations) == [0, 0, 1, 1, 2]


def test_heun_takes_the_mean_of_both_ends() -> None:
    asked = song(diffusion(2, 1.0, sampler=Sampler.HEUN))
    _, evaluations = play(asked, bent)
    now, ahead, then = (evaluation.queries[0] for evaluation in evaluations)
    torch.testing.assert_close(ahead.latents, euler(START, bent(now), 1.0, 0.5))
    torch.testing.assert_close(then.latents, euler(START, (bent(now) + bent(ahead)) / 2, 1.0, 0.5))


def test_heun_is_of_second_order_and_euler_of_first() -> None:
    errors = {
        (sampler, steps): (play(song(diffusion(steps, 1.0, sampler=sampler)), spread)[0] - START / 2).abs().max().item()
        for sampler in (Sampler.EULER, Sampler.HEUN)
        for steps in (32, 64)
    }
    assert errors[Sampler.EULER, 32] / errors[Sampler.EULER, 64] == pytest.approx(2, abs=0.3)
    assert errors[Sampler.HEUN, 32] / errors[Sampler.HEUN, 64] == pytest.approx(4, abs=0.6)


def test_sde_goes_to_the_data_and_back_with_fresh_noise() -> None:
    asked = song(diffusion(4, 3.0, sampler=Sampler.SDE))
    _, evaluations = play(asked, towards(DATA))
    for evaluation, fresh in zip(evaluations[1:], draw_noises(SEED, Purpose.STEP, FRAMES, CHANNELS), strict=False):
        query = evaluation.queries[0]
        torch.testing.assert_close(query.latents, noised(DATA, fresh, query.time), atol=1e-5, rtol=0)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("sampler", Sampler)
def test_the_same_seed_gives_the_same_bytes_and_another_others(task: Task, sampler: Sampler) -> None:
    asked = song(diffusion(sampler=sampler, guidance=Guidance(scale=4), wavelet=Wavelet()), task)
    first, again, other = (play(each, bent)[0] for each in (asked, asked, replace(asked, seed=SEED + 1)))
    assert first.numpy().tobytes() == again.numpy().tobytes()
    assert not torch.allclose(first, other, atol=1e-2)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("sampler", Sampler)
def test_steps_are_counted_on_to_the_last(task: Task, sampler: Sampler) -> None:
    _, evaluations = play(song(diffusion(9, sampler=sampler), task), bent)
    done = steps_done(evaluations)
    assert done == sorted(done)
    assert set(done) == set(range(done[0], 9))


def test_guidance_asks_for_both_velocities_within_its_interval() -> None:
    asked = song(diffusion(5, 1.0, guidance=Guidance(scale=4, start=0.3, end=0.7)))  # times 1, 0.8, 0.6, 0.4, 0.2
    _, evaluations = play(asked, bent)
    assert asked_under(evaluations) == [[0], [0], [0, 1], [0, 1], [0]]


def test_guidance_leads_every_step_with_its_momentum() -> None:
    asked = song(diffusion(guidance=Guidance(scale=4)))
    guide, latents = Guide(asked.diffusion.guidance), START
    for time, next_time in pairwise(asked.diffusion.times):
        estimate = guided_estimate(latents, time, PREPARED.conditional)
        latents = euler(latents, guide.guide([estimate])[0], time, next_time)
    torch.testing.assert_close(play(asked, bent)[0], latents)


def guided_estimate(latents: Tensor, time: float, conditional: Conditions) -> Estimate:
    """What the bent field says with words and without."""
    assert PREPARED.unconditional is not None
    velocities = [
        bent(Query(latents=latents, time=time, conditions=each)) for each in (conditional, PREPARED.unconditional)
    ]
    return Estimate(latents=latents, time=time, conditional=velocities[0], unconditional=velocities[1])


def test_without_unconditional_conditions_nothing_is_guided() -> None:
    _, evaluations = play(song(diffusion(2, guidance=Guidance(scale=4))), bent, replace(PREPARED, unconditional=None))
    assert asked_under(evaluations) == [[0], [0]]


def test_a_look_ahead_is_guided_by_plain_cfg_where_its_own_time_is() -> None:
    asked = song(diffusion(2, 1.0, sampler=Sampler.HEUN, guidance=Guidance(scale=4, end=0.7)))
    _, evaluations = play(asked, bent)
    assert asked_under(evaluations) == [[0], [0, 1], [0, 1]]
    now, ahead, then = (evaluation.queries for evaluation in evaluations)
    second = classifier_free(bent(ahead[0]), bent(ahead[1]), 4)
    torch.testing.assert_close(then[0].latents, euler(START, (bent(now[0]) + second) / 2, 1.0, 0.5))


def test_a_velocity_is_smoothed_by_those_before() -> None:
    answers = iter([1.0, 2.0, 3.0, 4.0])
    asked = song(diffusion(4, 1.0, velocity_ema_factor=0.5))
    latents, _ = play(asked, lambda query: torch.full_like(query.latents, next(answers)))
    torch.testing.assert_close(latents, START - (1 + 1.5 + 2.25 + 3.125) / 4)


def test_a_look_ahead_is_smoothed_by_its_own_step() -> None:
    answers = iter([1.0, 3.0, 6.0])
    asked = song(diffusion(2, 1.0, velocity_ema_factor=0.5, sampler=Sampler.HEUN))
    latents, _ = play(asked, lambda query: torch.full_like(query.latents, next(answers)))
    first = (1 + 2) / 2  # the look ahead is 3, smoothed to 2
    torch.testing.assert_close(latents, START - (first + (6 + first) / 2) / 2)


def test_no_velocity_is_longer_than_its_threshold_allows() -> None:
    asked = song(diffusion(8, velocity_norm_threshold=0.1))
    _, evaluations = play(asked, lambda query: 100 * DATA)
    way = [evaluation.queries[0] for evaluation in evaluations]
    for now, then in pairwise(way):
        velocity = (now.latents - then.latents) / (now.time - then.time)
        torch.testing.assert_close(velocity, DATA * 0.1 * now.latents.norm() / DATA.norm(), atol=1e-4, rtol=1e-4)


def test_no_look_ahead_is_longer_than_its_threshold_allows() -> None:
    answers = iter([0.0 * DATA, 100 * DATA, 0.0 * DATA])
    asked = song(diffusion(2, 1.0, velocity_norm_threshold=0.1, sampler=Sampler.HEUN))
    latents, _ = play(asked, lambda query: next(answers))
    torch.testing.assert_close(latents, START - 0.25 * DATA * 0.1 * START.norm() / DATA.norm())


@pytest.mark.parametrize("wavelet", [Wavelet(scale=0.3, high_scale=0.2), Wavelet(mode="pixel", scale=0.1)])
def test_a_wavelet_correction_pushes_each_step_away_from_its_data(wavelet: Wavelet) -> None:
    asked = song(diffusion(2, 1.5, wavelet=wavelet))
    _, [first, second] = play(asked, towards(DATA))
    assert torch.equal(first.queries[0].latents, START)
    step = euler(START, START - DATA, 1.0, 0.6)
    weights = band_weights(wavelet.mode, 1.0, wavelet.scale, wavelet.high_scale)
    torch.testing.assert_close(second.queries[0].latents, correct_bands(step, DATA, *weights))


def test_a_wavelet_correction_keeps_the_end_where_the_model_sees_it() -> None:
    latents, _ = play(song(diffusion(wavelet=Wavelet(scale=1, high_scale=1))), towards(DATA))
    torch.testing.assert_close(latents, DATA, atol=1e-5, rtol=0)


def test_a_retake_turns_the_first_noise() -> None:
    asked = song(diffusion(retake=Retake(seed=9, variance=0.25)))
    _, evaluations = play(asked, bent)
    expected = retake(START, draw_noise(9, FRAMES, CHANNELS), 0.25)
    assert torch.equal(evaluations[0].queries[0].latents, expected)


@pytest.mark.parametrize("task", [TASKS["words"], TASKS["edit"]], ids=["words", "edit"])
def test_a_whole_retake_is_the_song_of_its_seed(task: Task) -> None:
    retaken, _ = play(song(diffusion(sampler=Sampler.SDE, retake=Retake(seed=9, variance=1)), task), bent)
    straight, _ = play(song(diffusion(sampler=Sampler.SDE), task, seed=9), bent)
    torch.testing.assert_close(retaken, straight, atol=1e-5, rtol=0)


def test_latents_are_rescaled_and_shifted_at_the_end() -> None:
    asked = diffusion(latent_rescale=2.0, latent_shift=0.5)
    torch.testing.assert_close(play(song(asked), bent)[0], 2 * play(song(diffusion()), bent)[0] + 0.5)


def test_a_cover_follows_the_words_alone_after_its_share_of_the_steps() -> None:
    asked = song(diffusion(8, guidance=Guidance(scale=4)), Cover(strength=0.3))
    _, evaluations = play(asked, bent)
    assert asked_under(evaluations) == [[0, 1]] * 2 + [[2, 3]] * 6


@pytest.mark.parametrize(("strength", "place"), [(0.0, 2), (1.0, 0)])
def test_a_cover_may_follow_one_all_the_way(strength: float, place: int) -> None:
    _, evaluations = play(song(diffusion(8), Cover(strength=strength)), bent)
    assert asked_under(evaluations) == [[place]] * 8


def test_a_cover_starts_late_with_its_source_in_the_noise() -> None:
    asked = song(diffusion(8, 3.0), Cover(strength=0.5, noise_strength=0.25))
    _, evaluations = play(asked, bent)
    first = evaluations[0].queries[0]
    assert first.time == 0.75
    assert torch.equal(first.latents, noised(DATA, START, 0.75))
    assert steps_done(evaluations) == [4, 5, 6, 7]
    assert asked_under(evaluations) == [[0], [0], [2], [2]]


def test_a_repaint_puts_its_source_back_for_its_share_of_the_steps() -> None:
    asked = song(diffusion(8, 3.0), Repaint(start=3, end=7, injection=0.5, blend_frames=0))
    latents, evaluations = play(asked, bent)
    for step, evaluation in enumerate(evaluations):
        query = evaluation.queries[0]
        kept = noised(DATA, START, query.time)
        for part in (slice(None, 3), slice(7, None)):
            assert torch.equal(query.latents[part], kept[part]) == (step <= 4)
        assert step == 0 or not torch.allclose(query.latents[3:7], kept[3:7], atol=1e-3)
    assert not torch.allclose(latents[:3], DATA[:3], atol=1e-3)


@pytest.mark.parametrize("blend_frames", [0, 25])
@pytest.mark.parametrize("sampler", Sampler)
def test_what_a_repaint_keeps_to_the_end_is_its_source_to_the_bit(blend_frames: int, sampler: Sampler) -> None:
    asked = song(
        diffusion(8, sampler=sampler, guidance=Guidance(scale=4), wavelet=Wavelet()),
        Repaint(start=3, end=7, injection=1.0, blend_frames=blend_frames),
    )
    latents, _ = play(asked, bent)
    assert torch.equal(latents[:3], DATA[:3])
    assert torch.equal(latents[7:], DATA[7:])
    assert not torch.allclose(latents[3:7], DATA[3:7], atol=1e-2)


def test_a_repaint_is_blended_at_its_ends() -> None:
    free, blended = (Repaint(start=3, end=7, injection=0.0, blend_frames=frames) for frames in (0, 2))
    latents = play(song(diffusion(), free), bent)[0]
    assert torch.equal(play(song(diffusion(), blended), bent)[0], blend(latents, DATA, 3, 7, 2))


def edit(start: float = 0.0, end: float = 1.0, averages: int = 1) -> Edit:
    """An edit with some words."""
    return Edit(source_caption="", source_lyrics="", start=start, end=end, averages=averages)


def told_apart(query: Query) -> Tensor:
    """Lead to the source where it is told in its own words, and elsewhere to other data."""
    return towards(DATA if query.conditions is PREPARED.told else OTHER)(query)


@given(steps=st.integers(1, 12), end=st.floats(0, 1), averages=st.integers(1, 3))
def test_an_edit_leads_from_the_source_to_the_words(steps: int, end: float, averages: int) -> None:
    latents, evaluations = play(song(diffusion(steps), edit(end=end, averages=averages)), told_apart)
    torch.testing.assert_close(latents, OTHER, atol=1e-4, rtol=0)
    paired = int(steps * end)
    assert asked_under(evaluations) == [[4, 0]] * paired * averages + [[0]] * (steps - paired)


def test_an_edit_to_the_same_words_leaves_the_source() -> None:
    latents, _ = play(song(diffusion(), edit()), towards(DATA))
    torch.testing.assert_close(latents, DATA, atol=1e-5, rtol=0)


def test_an_edit_leaves_out_its_first_steps() -> None:
    latents, evaluations = play(song(diffusion(8), edit(start=0.5)), told_apart)
    assert steps_done(evaluations) == [4, 5, 6, 7]
    torch.testing.assert_close(latents, OTHER, atol=1e-5, rtol=0)


def test_an_edit_without_steps_is_its_source() -> None:
    latents, evaluations = play(song(diffusion(), edit(start=1.0)), told_apart)
    assert evaluations == []
    assert torch.equal(latents, DATA)


def test_an_edit_goes_on_by_itself_from_noised_latents() -> None:
    asked = song(diffusion(4, 1.0), edit(end=0.5))
    _, evaluations = play(asked, bent)
    *_, third = islice(draw_noises(SEED, Purpose.EDIT, FRAMES, CHANNELS), 3)
    query = evaluations[2].queries[0]
    edited = draft(asked, averages=1, steps=2)
    assert query.conditions is PREPARED.conditional
    torch.testing.assert_close(query.latents, edited + noised(DATA, third, 0.5) - DATA)


def draft(asked: Song, *, averages: int, steps: int) -> Tensor:
    """Edit the source as the formula says, step by step and side by side."""
    assert PREPARED.told is not None
    noises = draw_noises(SEED, Purpose.EDIT, FRAMES, CHANNELS)
    away, towards_words = Guide(asked.diffusion.guidance), Guide(asked.diffusion.guidance)
    is_guided, edited = asked.diffusion.guidance.scale > 1, DATA
    for time, next_time in list(pairwise(asked.diffusion.times))[:steps]:
        starts = [noised(DATA, next(noises), time) for _ in range(averages)]
        told = [guided_estimate(start, time, PREPARED.told) for start in starts]
        own = [guided_estimate(edited + start - DATA, time, PREPARED.conditional) for start in starts]
        if not is_guided:
            told, own = ([replace(each, unconditional=None) for each in side] for side in (told, own))
        difference = torch.stack(towards_words.guide(own)) - torch.stack(away.guide(told))
        edited = euler(edited, difference.mean(0), time, next_time)
    return edited


@pytest.mark.parametrize("method", [GuidanceMethod.APG, GuidanceMethod.CFG])
@pytest.mark.parametrize("averages", [1, 3])
def test_an_edit_follows_its_formula_with_a_momentum_on_each_side(method: GuidanceMethod, averages: int) -> None:
    asked = song(diffusion(guidance=Guidance(scale=4, method=method)), edit(averages=averages))
    latents, evaluations = play(asked, bent)
    assert asked_under(evaluations) == [[4, 1, 0, 1]] * 6 * averages
    assert steps_done(evaluations) == [step for step in range(6) for _ in range(averages)]
    torch.testing.assert_close(latents, draft(asked, averages=averages, steps=6), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", Sampler)
def test_an_edit_takes_eulers_steps_and_apg_for_angles(sampler: Sampler) -> None:
    def made(sampler: Sampler, method: GuidanceMethod) -> Tensor:
        return play(song(diffusion(sampler=sampler, guidance=Guidance(scale=4, method=method)), edit()), bent)[0]

    assert torch.equal(made(sampler, GuidanceMethod.ADG), made(Sampler.EULER, GuidanceMethod.APG))
    assert not torch.allclose(made(sampler, GuidanceMethod.CFG), made(Sampler.EULER, GuidanceMethod.APG), atol=1e-2)
