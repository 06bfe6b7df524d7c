"""What every engine does: write tokens that a rule allows, for many texts at once."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from soundstage_lm.brief import Sampling
from soundstage_lm.rules import Rule


class TokenSet:
    """Token ids that may come next, rising. Made once and shared: engines keep what belongs to one by its identity.

    Of a greedy set the likeliest token is taken, whatever the temperature.
    """

    def __init__(self, ids: NDArray[np.int64], *, is_greedy: bool = False) -> None:
        self.ids = ids
        self.is_greedy = is_greedy

    def __len__(self) -> int:
        return len(self.ids)


class Constraint(Protocol):
    """The state of one text under its rule."""

    @property
    def allowed(self) -> TokenSet | None:
        """What may come next; None when the text is whole."""
        ...

    def advance(self, token: int) -> None:
        """Take the next token, one of `allowed`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to write. With two prompts the second is the unconditional one, and the text is guided."""

    prompts: tuple[tuple[int, ...], ...]
    rule: Rule
    sampling: Sampling
    seed: int
    phase: int  # texts of one song draw from streams of their own


class Writer(Protocol):
    """An engine."""

    def write(self, text: Text) -> AsyncGenerator[int, None]:
        """Yield the tokens of a text as they are drawn, until its rule is fulfilled.

        Closing the generator stops the engine before the text's next token and frees what the text held. Raises
        InvalidRequestError when the prompts leave the model no room.
        """
        ...

    @property
    def num_live(self) -> int:
        """How many texts hold memory in the engine."""
        ...
