"""The compatibility guide's figures, row by row, and which card gets which row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage_budget.tiers import TIERS, LmSize, tier_of

ALL = ("0.6B", "1.7B", "4B")


@pytest.mark.parametrize(
    ("memory_gib", "name", "has_xl", "lms", "default", "is_vllm", "minutes", "batch", "is_int8"),
    [
        (0, "1", False, (), None, False, (4, 6), (1, 1), True),
        (3, "1", False, (), None, False, (4, 6), (1, 1), True),
        (4, "1", False, (), None, False, (4, 6), (1, 1), True),
        (5, "2", False, (), None, False, (8, 10), (1, 1), True),
        (6, "3", False, ALL[:1], "0.6B", False, (8, 10), (2, 2), True),
        (8, "4", False, ALL[:1], "0.6B", True, (8, 10), (2, 4), True),
        (11, "4", False, ALL[:1], "0.6B", True, (8, 10), (2, 4), True),
        (12, "5", True, ALL[:2], "1.7B", True, (8, 10), (4, 4), True),
        (15.4, "5", True, ALL[:2], "1.7B", True, (8, 10), (4, 4), True),
        (15.5, "6a", True, ALL[:2], "1.7B", True, (8, 10), (4, 8), True),
        (20, "6b", True, ALL, "1.7B", True, (8, 8), (8, 8), False),
        (24, "unlimited", True, ALL, "4B", True, (10, 10), (8, 8), False),
        (180, "unlimited", True, ALL, "4B", True, (10, 10), (8, 8), False),
    ],
)
def test_every_row_of_the_guide(
    memory_gib: float,
    name: str,
    has_xl: bool,
    lms: tuple[LmSize, ...],
    default: LmSize | None,
    is_vllm: bool,
    minutes: tuple[int, int],
    batch: tuple[int, int],
    is_int8: bool,
) -> None:
    tier = tier_of(memory_gib)
    assert (tier.name, tier.has_xl, tier.lm_sizes, tier.default_lm, tier.is_vllm) == (
        name,
        has_xl,
        lms,
        default,
        is_vllm,
    )
    limits = [tier.limits(is_planned=True), tier.limits(is_planned=False)]
    assert tuple(limit.max_duration_s for limit in limits) == tuple(60 * count for count in minutes)
    assert tuple(limit.max_batch for limit in limits) == batch
    assert tier.is_int8 == is_int8


@given(st.floats(0, 200), st.floats(0, 200))
def test_more_memory_is_never_a_lower_tier(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert TIERS.index(tier_of(low)) <= TIERS.index(tier_of(high))
