"""Constrained decoding of the metadata: at every step the few tokens that keep the text legal.

The text is `<think>`, a line per field, end of turn. A line is a trie over the token sequences of all lines that the
field may be, each encoded whole, as the model saw it in training. A value that the user fixed leaves one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from soundstage_lm.cot import KEYS, line_value
from soundstage_lm.prompts import Control
from soundstage_lm.rules import CodesRule, Rule, ThoughtRule
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.writer import Constraint, TokenSet
from soundstage_runtime.score import BPM_RANGE, KEY_SCALES, TIME_SIGNATURES

MIN_DURATION_S: Final = 10


class Node:
    """A place in a trie: which tokens may follow, and where they lead."""

    __slots__ = ("allowed", "children")

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        """Build a trie of token sequences, none of which may begin another."""
        tails: dict[int, list[Sequence[int]]] = {}
        for first, *rest in filter(None, sequences):
            tails.setdefault(first, []).append(rest)
        self.children = {token: Node(rests) for token, rests in sorted(tails.items())}
        self.allowed = TokenSet(np.array(list(self.children), dtype=np.int64))


class Grammar:
    """The tries of one tokenizer, built once and never changed."""

    def __init__(self, tokenizer: PlannerTokenizer, *, max_duration_s: int) -> None:
        """Durations that the model chooses lie between MIN_DURATION_S and `max_duration_s`."""
        self._tokenizer = tokenizer
        self._codes = TokenSet(tokenizer.code_ids)
        self._free = {
            "bpm": self._lines("bpm", range(BPM_RANGE[0], BPM_RANGE[1] + 1)),
            "duration": self._lines("duration", range(MIN_DURATION_S, max_duration_s + 1)),
            "keyscale": self._lines("keyscale", KEY_SCALES),
            "timesignature": self._lines("timesignature", TIME_SIGNATURES),
        }
        self._opening = Node([[tokenizer.controls[Control.THINK], *tokenizer.encode("\n")]])
        self._closing = Node([[tokenizer.controls[Control.END]]])

    def begin(self, rule: Rule) -> Constraint:
        """Begin one text under a rule."""
        if isinstance(rule, CodesRule):
            return Codes(self._codes, rule.count)
        return Writing([self._opening, *(self._line(rule, key) for key in rule.keys), self._closing])

    def _line(self, rule: ThoughtRule, key: str) -> Node:
        value = getattr(rule.given, KEYS[key])
        return self._free[key] if value is None else self._lines(key, [line_value(key, value)])

    def _lines(self, key: str, values: Iterable[str | int]) -> Node:
        return Node([self._tokenizer.encode(f"{key}: {value}\n") for value in values])


class Writing:
    """One text being written: the state of one sequence."""

    def __init__(self, parts: Sequence[Node]) -> None:
        self._ahead = list(parts)
        self._node = self._ahead.pop(0)

    @property
    def allowed(self) -> TokenSet | None:
        """See Constraint."""
        return self._node.allowed or None

    def advance(self, token: int) -> None:
        """Take the next token, one of `allowed`."""
        self._node = self._node.children[token]
        if not self._node.children and self._ahead:
            self._node = self._ahead.pop(0)


class Codes:
    """Exactly `count` audio codes."""

    def __init__(self, codes: TokenSet, count: int) -> None:
        self._codes, self._left = codes, count

    @property
    def allowed(self) -> TokenSet | None:
        """See Constraint."""
        return self._codes if self._left else None

    def advance(self, token: int) -> None:
        """Count the code."""
        self._left -= 1
