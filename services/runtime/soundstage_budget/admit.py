"""Budgets on one card: whether they add up."""

from collections.abc import Mapping
from typing import Final

from soundstage_budget.cards import Card
from soundstage_budget.plan import DoesNotFitError, Service, size

_RESERVE: Final = 0.04  # of a card, for what it shows and what drivers round up


class BudgetsDoNotAddUpError(DoesNotFitError):
    """Budgets are more than the card has."""


def usable_bytes(card: Card) -> int:
    """Return what services may share of a card."""
    return int(card.memory_bytes * (1 - _RESERVE))


def admit(card: Card, budgets: Mapping[Service, int]) -> None:
    """Raise BudgetsDoNotAddUpError, with the sum, unless budgets fit on a card together."""
    total, usable = sum(budgets.values()), usable_bytes(card)
    if total > usable:
        terms = " + ".join(f"{name} {size(budget)}" for name, budget in budgets.items())
        raise BudgetsDoNotAddUpError(
            f"{terms} = {size(total)}, but {card.name} has {size(usable)} to share; "
            f"{size(total - usable)} less would do"
        )
