"""What a text must be. A rule is plain data, so that an engine in another process can follow it too."""

from dataclasses import dataclass

from soundstage_lm.brief import Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class CodesRule:
    """Exactly `count` audio codes; the end of turn is never written."""

    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtRule:
    """A chain of thought with the fields `keys`, in that order; those that `given` fixes are forced.

    With `has_lyrics` the thought is closed and free text follows until the end of turn; else the turn ends at once.
    """

    keys: tuple[str, ...]
    given: Metadata
    has_lyrics: bool = False


Rule = CodesRule | ThoughtRule
