"""What a card of some size is given: the model family's own compatibility guide, as a table."""

from dataclasses import dataclass
from typing import Final, Literal

LmSize = Literal["0.6B", "1.7B", "4B"]
LM_SIZES: Final[tuple[LmSize, ...]] = ("0.6B", "1.7B", "4B")  # rising
_TOLERANCE_GIB: Final = 0.5  # a card reports that much less than it is sold with
_TINY_GIB: Final = 4.0  # a card of just so much is still of the lowest tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The longest song, and the most songs at once."""

    max_duration_s: int
    max_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A row of the guide; `has_xl` is whether it runs the XL models, offloaded or not."""

    name: str
    least_gib: float
    has_xl: bool
    lm_sizes: tuple[LmSize, ...]
    default_lm: LmSize | None
    is_vllm: bool
    with_lm: Limits
    without_lm: Limits
    is_int8: bool

    def limits(self, *, is_planned: bool) -> Limits:
        """Return the limits beside a language model, or without one."""
        return self.with_lm if is_planned else self.without_lm


def _tier(
    name: str,
    least_gib: float,
    lm_sizes: tuple[LmSize, ...],
    default_lm: LmSize | None,
    *,
    minutes: tuple[int, int],
    batch: tuple[int, int],
    has_xl: bool = False,
    is_vllm: bool = True,
    is_small: bool = True,
) -> Tier:
    with_lm, without_lm = (Limits(max_duration_s=60 * m, max_batch=b) for m, b in zip(minutes, batch, strict=True))
    return Tier(
        name=name,
        least_gib=least_gib,
        has_xl=has_xl,
        lm_sizes=lm_sizes,
        default_lm=default_lm,
        is_vllm=is_vllm,
        with_lm=with_lm,
        without_lm=without_lm,
        is_int8=is_small,
    )


TIERS: Final = (
    _tier("1", 0, (), None, minutes=(4, 6), batch=(1, 1), is_vllm=False),
    _tier("2", 4, (), None, minutes=(8, 10), batch=(1, 1), is_vllm=False),
    _tier("3", 6, ("0.6B",), "0.6B", minutes=(8, 10), batch=(2, 2), is_vllm=False),
    _tier("4", 8, ("0.6B",), "0.6B", minutes=(8, 10), batch=(2, 4)),
    _tier("5", 12, ("0.6B", "1.7B"), "1.7B", minutes=(8, 10), batch=(4, 4), has_xl=True),
    _tier("6a", 16, ("0.6B", "1.7B"), "1.7B", minutes=(8, 10), batch=(4, 8), has_xl=True),
    _tier("6b", 20, LM_SIZES, "1.7B", minutes=(8, 8), batch=(8, 8), has_xl=True, is_small=False),
    _tier("unlimited", 24, LM_SIZES, "4B", minutes=(10, 10), batch=(8, 8), has_xl=True, is_small=False),
)


def tier_of(memory_gib: float) -> Tier:
    """Return the tier of a card that reports so much memory; 0 is no card, and has the limits of the lowest tier."""
    if memory_gib <= _TINY_GIB:
        return TIERS[0]
    return max((tier for tier in TIERS if tier.least_gib - _TOLERANCE_GIB <= memory_gib), key=lambda t: t.least_gib)
