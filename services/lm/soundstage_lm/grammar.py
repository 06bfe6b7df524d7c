"""Constrained decoding: at every step the tokens that keep a text legal.

A thought is `<think>`, a line per field, and the end of the turn, or `</think>` and lyrics. The lines that a field may
be are a trie of token sequences, each line encoded whole, as the model saw it in training; a value that the user fixed
leaves one line. Captions and genres are prose. Nothing that is built for a tokenizer changes afterwards: a text's state
is its own, so any number are written at once.
"""

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

import numpy as np

from soundstage_lm.cot import KEYS, line
from soundstage_lm.prompts import Control
from soundstage_lm.prose import Lyrics, Prose, Words
from soundstage_lm.rules import MAX_LYRICS_TOKENS, CodesRule, Rule
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.trie import Choice, Node
from soundstage_lm.writer import Constraint, TokenSet
from soundstage_runtime.score import BPM_RANGE, KEY_SCALES, LANGUAGES, TIME_SIGNATURES
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS

MIN_DURATION_S: Final = 10
PROSE_TOKENS: Final = {"caption": 512, "genres": 128}


class Part(Protocol):
    """A stretch of a text."""

    @property
    def allowed(self) -> TokenSet: ...

    @property
    def is_whole(self) -> bool: ...

    def take(self, token: int) -> bool:
        """Go on with one of `allowed`; False says that the token begins the next part."""
        ...


class Grammar:
    """What one tokenizer's texts may be, built once."""

    def __init__(self, tokenizer: PlannerTokenizer, *, max_duration_s: int) -> None:
        """Durations that the model chooses lie between MIN_DURATION_S and `max_duration_s`."""
        self._tokenizer = tokenizer
        self._shared: dict[tuple[bool, bytes], TokenSet] = {}
        self._words = Words(tokenizer.words, end=tokenizer.controls[Control.END])
        self._codes = TokenSet(tokenizer.code_ids)
        self._free = {
            "bpm": self._lines("bpm", range(BPM_RANGE[0], BPM_RANGE[1] + 1)),
            "duration": self._lines("duration", range(MIN_DURATION_S, max_duration_s + 1)),
            "keyscale": self._lines("keyscale", KEY_SCALES),
            # The reference never samples a language.
            "language": self._lines("language", LANGUAGES, is_greedy=True),
            "timesignature": self._lines("timesignature", TIME_SIGNATURES),
        }
        self._names = {key: self._trie([tokenizer.encode(f"{key}:")]) for key in PROSE_TOKENS}
        self._opening = self._trie([[tokenizer.controls[Control.THINK], *tokenizer.encode("\n")]])
        self._end_thought = self._trie([[tokenizer.controls[Control.END_THINK]]])
        self._end_turn = self._trie([[tokenizer.controls[Control.END]]])

    def begin(self, rule: Rule) -> Constraint:
        """Begin one text under a rule."""
        if isinstance(rule, CodesRule):
            return Writing([Codes(self._codes, rule.count)] if rule.count else [])
        follows = self._end_thought if rule.has_lyrics else self._end_turn
        parts: list[Part] = [Choice(follows)]
        for key in reversed(rule.keys):
            if key in PROSE_TOKENS:
                parts.append(self._prose(key, follows.allowed))
                follows = self._names[key]
            else:
                value = getattr(rule.given, KEYS[key])
                follows = self._free[key] if value is None else self._lines(key, [value])
            parts.append(Choice(follows))
        parts = [Choice(self._opening), *reversed(parts)]
        if rule.has_lyrics:
            parts.append(Lyrics(self._words, max_tokens=MAX_LYRICS_TOKENS, max_chars=MAX_LYRICS_CHARS))
        return Writing(parts)

    def _prose(self, key: str, follows: TokenSet) -> Prose:
        or_on = self._share([self._words.space, *follows.ids.tolist()])
        limits = {"max_tokens": PROSE_TOKENS[key], "max_chars": MAX_CAPTION_CHARS}
        return Prose(self._words, follows, or_on, **limits)

    def _lines(self, key: str, values: Iterable[str | float], *, is_greedy: bool = False) -> Node:
        return self._trie([self._tokenizer.encode(line(key, value)) for value in values], is_greedy=is_greedy)

    def _trie(self, sequences: Iterable[Sequence[int]], *, is_greedy: bool = False) -> Node:
        return Node(sequences, lambda ids: self._share(ids, is_greedy=is_greedy))

    def _share(self, ids: Iterable[int], *, is_greedy: bool = False) -> TokenSet:
        rising = np.array(sorted(ids), dtype=np.int64)
        return self._shared.setdefault((is_greedy, rising.tobytes()), TokenSet(rising, is_greedy=is_greedy))


class Codes:
    """Exactly `count` audio codes."""

    def __init__(self, codes: TokenSet, count: int) -> None:
        self.allowed = codes
        self._left = count

    @property
    def is_whole(self) -> bool:
        """Whether all are written."""
        return not self._left

    def take(self, token: int) -> bool:
        """Count a code."""
        self._left -= 1
        return True


class Writing:
    """One text being written: the state of one sequence."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self._ahead = iter(parts)
        self._part = next(self._ahead, None)

    @property
    def allowed(self) -> TokenSet | None:
        """See Constraint."""
        return self._part.allowed if self._part else None

    def advance(self, token: int) -> None:
        """Take the next token, one of `allowed`."""
        while self._part and not self._part.take(token):
            self._part = next(self._ahead, None)
        if self._part and self._part.is_whole:
            self._part = next(self._ahead, None)
