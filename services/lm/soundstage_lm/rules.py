"""What a text must be. A rule is plain data, so that an engine in another process can follow it too."""

from dataclasses import dataclass
from typing import Final

from soundstage_lm.brief import Metadata

# Engines reserve memory for the longest text that a rule allows, so a grammar ends a text before it is longer.
MAX_THOUGHT_TOKENS: Final = 1024
MAX_LYRICS_TOKENS: Final = 3072


@dataclass(frozen=True, slots=True, kw_only=True)
class CodesRule:
    """Exactly `count` audio codes; the end of turn is never written."""

    count: int

    @property
    def max_tokens(self) -> int:
        """The longest that the text may become."""
        return self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtRule:
    """A chain of thought with the fields `keys`, in that order; those that `given` fixes are forced.

    With `has_lyrics` the thought is closed and free text follows until the end of turn; else the turn ends at once.
    """

    keys: tuple[str, ...]
    given: Metadata
    has_lyrics: bool = False

    @property
    def max_tokens(self) -> int:
        """The longest that the text may become."""
        return MAX_THOUGHT_TOKENS + (MAX_LYRICS_TOKENS if self.has_lyrics else 0)


Rule = CodesRule | ThoughtRule
