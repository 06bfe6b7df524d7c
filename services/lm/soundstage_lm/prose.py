"""Free text: which tokens may stand in it, and how it ends, so that what is written can always be read back.

Prose is a YAML value: a space and something visible, on as many lines as it likes, each further one indented by two
spaces. Byte-pair encoding gives such an indent as a space of its own and a space that belongs to the word.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

import numpy as np

from soundstage_lm.writer import TokenSet

_CONTROLS: Final = frozenset({*range(32), 127}) - {ord("\n")}


class Words:
    """The words of a tokenizer, sorted once into the sets that free text needs."""

    def __init__(self, words: Mapping[int, bytes], *, end: int) -> None:
        """Take every word's bytes, and the token that ends a turn."""
        clean = {token: text for token, text in words.items() if text and _CONTROLS.isdisjoint(text)}
        # A backtick begins what a chat model does when it is lost: a block of code.
        plain = {token: text for token, text in clean.items() if b"`" not in text}
        by_text = {text: token for token, text in plain.items()}
        self.space, self.newline = by_text[b" "], by_text[b"\n"]

        def ids(tokens: set[int]) -> TokenSet:
            return TokenSet(np.array(sorted(tokens), dtype=np.int64))

        inside = {token for token, text in plain.items() if b"\n" not in text}
        visible = {token for token in inside if plain[token][:1] != b" "}
        spaced = {token for token in inside if plain[token][:1] == b" " and plain[token][1:2] not in (b"", b" ")}
        ending = {token for token, text in plain.items() if text.find(b"\n") == len(text) - 1}
        self.opening = ids(spaced | {self.space})  # begins a line
        self.visible = ids(visible)  # goes on after a space of its own
        self.going_on = ids(inside | ending)  # goes on in a line, or ends it
        self.line_ends = frozenset(ending)
        self.line_end = ids({self.newline})
        self.lyrics = ids(clean.keys() | {end})
        self.end, self.turn_end = end, ids({end})
        # Characters are counted by the bytes that begin one.
        self.chars = {token: sum(byte & 0xC0 != 0x80 for byte in text) for token, text in clean.items()}
        self.longest = max(self.chars.values())


class _Place(Enum):
    OPENING = auto()
    SPACED = auto()
    INSIDE = auto()
    ENDED = auto()


class Prose:
    """One value of free text; it ends with the line after which what follows it begins."""

    def __init__(self, words: Words, follows: TokenSet, or_on: TokenSet, *, max_tokens: int, max_chars: int) -> None:
        """Take what may follow, alone and together with the space that goes on in another line."""
        self._words, self._follows, self._or_on = words, follows, or_on
        self._tokens_left, self._chars_left = max_tokens, max_chars
        self._place = _Place.OPENING

    @property
    def allowed(self) -> TokenSet:
        """What may come next."""
        match self._place:
            case _Place.OPENING:
                return self._words.opening
            case _Place.SPACED:
                return self._words.visible
            case _Place.INSIDE:
                return self._words.going_on if self._has_room else self._words.line_end
            case _Place.ENDED:
                return self._or_on if self._has_room else self._follows

    @property
    def is_whole(self) -> bool:
        """Never: only what follows ends prose."""
        return False

    def take(self, token: int) -> bool:
        """Go on with one of `allowed`; answer False when the token is no longer prose."""
        words = self._words
        match self._place:
            case _Place.ENDED:
                if token != words.space:
                    return False
                self._place = _Place.OPENING
            case _Place.OPENING if token == words.space:
                self._place = _Place.SPACED
            case _:
                self._place = _Place.ENDED if token in words.line_ends else _Place.INSIDE
        self._tokens_left -= 1
        self._chars_left -= words.chars[token]
        return True

    @property
    def _has_room(self) -> bool:
        """Whether another line fits: two spaces, a word and a newline."""
        return self._tokens_left >= 4 and self._chars_left >= self._words.longest + 3


class Lyrics:
    """Free text until the end of the turn."""

    def __init__(self, words: Words, *, max_tokens: int, max_chars: int) -> None:
        self._words = words
        self._tokens_left, self._chars_left = max_tokens, max_chars
        self.is_whole = False

    @property
    def allowed(self) -> TokenSet:
        """What may come next."""
        has_room = self._tokens_left > 1 and self._chars_left >= self._words.longest
        return self._words.lyrics if has_room else self._words.turn_end

    def take(self, token: int) -> bool:
        """Go on with one of `allowed`."""
        self.is_whole = token == self._words.end
        self._tokens_left -= 1
        self._chars_left -= self._words.chars.get(token, 0)
        return True
