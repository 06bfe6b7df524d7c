"""Three stages on one card, by arithmetic."""

import pytest

from soundstage_budget.cards import Card
from soundstage_budget.deployment import BudgetsDoNotAddUpError, usable_bytes
from soundstage_budget.models import DITS, LMS, VAE
from soundstage_budget.single_card import Checkpoints, add_up, flags_of, share
from soundstage_budget.tiers import LmSize


def card(memory_gib: float) -> Card:
    return Card(name="a card", memory_gib=memory_gib, capability=(8, 6))


@pytest.mark.parametrize(("memory_gib", "lm"), [(8, "0.6B"), (12, "1.7B"), (16, "1.7B"), (24, "4B")])
def test_all_three_fit_one_card(memory_gib: float, lm: LmSize) -> None:
    plans = share(card(memory_gib), Checkpoints(lm=LMS[lm], dit=DITS["turbo"], vae=VAE))
    assert [plan.service for plan in plans] == ["lm", "dit", "vae"]
    assert sum(plan.budget_bytes for plan in plans) <= usable_bytes(card(memory_gib))
    assert all(plan.max_duration_s == 600 for plan in plans)
    is_small = memory_gib < 20
    assert ("--quantization" in flags_of(plans)["dit"]) is is_small


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
    models = Checkpoints(lm=LMS["0.6B"], dit=DITS["turbo"], vae=VAE)
    large, small = share(card(24), models), share(card(16), models)
    assert small[0].max_batch < large[0].max_batch
    assert small[0].max_duration_s == large[0].max_duration_s
    assert add_up(large).count(" + ") == 2
