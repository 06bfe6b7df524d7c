"""What `soundstage doctor` says of the next card is what that card's own plan has."""

import pytest

from soundstage_budget.cards import CARDS, Card, find_card
from soundstage_budget.deployment import Wishes, deploy
from soundstage_budget.larger_card import describe_next
from soundstage_budget.single_card import Terms


@pytest.mark.parametrize(
    ("card", "words"),
    [
        (find_card("GTX 1650"), "a card of 6 GB would have the 0.6B language model"),
        (Card(name="no more than 4", memory_gib=4, capability=(8, 0)), "a card of 6 GB would have the 0.6B"),
        (find_card("RTX 3050"), "a card of 12 GB would have the 1.7B language model, the XL models, 2 songs at once"),
        (find_card("RTX 3080"), "a card of 12 GB would have the 1.7B language model, the XL models"),
        (find_card("Tesla T4"), "a card of 20 GB would have 4 songs at once, weights in full"),
        (find_card("A10"), "a card of 32 GB would have the 4B language model, songs of 10 minutes"),
        (find_card("RTX 4090"), "a card of 32 GB would have 8 songs at once"),
        (Card(memory_gib=23.5), "a card of 6 GB would have the 0.6B language model"),
    ],
)
def test_the_next_card_is_larger_and_told_by_what_it_buys(card: Card, words: str) -> None:
    assert describe_next(deploy(card, Wishes()), Wishes()).startswith(words)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_the_next_card_is_never_of_the_same_size(card: Card) -> None:
    words = describe_next(deploy(card, Wishes()), Wishes()).split()
    assert not words or int(words[3]) > int(card.name.split()[-1].removesuffix("GB"))


def test_of_a_card_that_can_all_nothing_is_said() -> None:
    assert describe_next(deploy(find_card("H100"), Wishes()), Wishes()) == ""


def test_a_wish_is_taken_to_the_larger_card() -> None:
    wishes = Wishes(lm="none", terms=Terms(max_batch=1))
    assert describe_next(deploy(find_card("RTX 3050"), wishes), wishes) == "a card of 12 GB would have the XL models"
