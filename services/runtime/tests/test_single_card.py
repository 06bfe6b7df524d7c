"""Three stages on one card, by arithmetic."""

import pytest

from soundstage_budget.admit import BudgetsDoNotAddUpError, usable_bytes
from soundstage_budget.cards import Card
from soundstage_budget.installed import Installed
from soundstage_budget.models import DITS, LMS, VAE
from soundstage_budget.single_card import Checkpoints, Terms, add_up, flags_of, share
from soundstage_budget.tiers import LmSize


def card(memory_gib: float) -> Card:
    return Card(name="a card", memory_gib=memory_gib, capability=(8, 6))


@pytest.mark.parametrize(("memory_gib", "lm"), [(8, "0.6B"), (12, "1.7B"), (16, "1.7B"), (24, "4B")])
def test_all_three_fit_one_card(memory_gib: float, lm: LmSize) -> None:
    plans = share(card(memory_gib), Checkpoints(lm=LMS[lm], dit=DITS["turbo"], vae=VAE))
    assert [plan.service for plan in plans] == ["lm", "dit", "vae"]
    assert sum(plan.budget_bytes for plan in plans) <= usable_bytes(card(memory_gib))
    # By the guide's tiers; a song that brings its codes may be as long as without a planner.
    assert [plan.max_duration_s for plan in plans] == ([480, 600, 600] if memory_gib < 20 else [600] * 3)
    assert plans[1].quantization == ("int8" if memory_gib < 20 else "none")


@pytest.mark.parametrize("memory_gib", [8, 12, 16])
def test_weights_are_not_rounded_where_torchao_is_not_installed(memory_gib: float) -> None:
    models = Checkpoints(lm=LMS["0.6B"], dit=DITS["turbo"], vae=VAE)
    plans = share(card(memory_gib), models, Terms(installed=Installed(vllm_version=None, has_torchao=False)))
    lm, dit, _ = plans
    assert (lm.engine, dit.quantization) == ("torch", "none")
    assert (dit.offload != "none") is (memory_gib == 8)
    asked = share(card(memory_gib), models, Terms(quantization="fp8"))
    assert asked[1].quantization == "fp8"


def test_half_of_what_is_left_widens_the_codecs_tiles() -> None:
    models = Checkpoints(lm=LMS["0.6B"], dit=DITS["turbo"], vae=VAE)
    *_, small = share(card(12), models)
    *_, large = share(card(80), models)
    assert (large.window_frames, large.max_tiles) == (1536, 4)
    assert small.window_frames < 1536
    *_, cpu = share(Card(memory_gib=80), models)
    assert (cpu.window_frames, cpu.max_tiles) == (64, 1)


def test_each_is_told_of_its_budget_in_whole_mebibytes() -> None:
    plans = share(card(24), Checkpoints(lm=LMS["0.6B"], dit=DITS["turbo"], vae=VAE))
    for plan in plans:
        flag, amount, *_ = flags_of(plans)[plan.service]
        assert flag == "--gpu-memory"
        assert 0 <= int(amount.removesuffix("MiB")) * 2**20 - plan.budget_bytes < 2**20


def test_what_does_not_fit_is_refused_with_the_least_sum() -> None:
    models = Checkpoints(lm=LMS["4B"], dit=DITS["xl-base"], vae=VAE)
    with pytest.raises(BudgetsDoNotAddUpError, match=r"to share, but .* lm \S+ GiB \+ dit \S+ GiB \+ vae \S+ GiB = "):
        share(card(8), models)


def test_less_memory_makes_fewer_songs_before_shorter_ones() -> None:
    models = Checkpoints(lm=LMS["4B"], dit=DITS["turbo"], vae=VAE)
    large, small = share(card(32), models), share(card(24), models)
    assert small[0].max_batch < large[0].max_batch
    assert small[0].max_duration_s == large[0].max_duration_s == 600
    assert add_up(large).count(" + ") == 2
