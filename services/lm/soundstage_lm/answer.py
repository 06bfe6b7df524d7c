"""What the model wrote, read back into a song's words."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from soundstage_lm import cot
from soundstage_lm.brief import Metadata
from soundstage_lm.prompts import Control
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_runtime.text import without_control_tokens

_HEADER: Final = re.compile(r"^#[ ]*lyrics?[ ]*:?[ ]*$\n?", re.IGNORECASE | re.MULTILINE)
_HEADER_WITHIN: Final = 80  # a block of languages may stand before it


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A thought, and the words after it."""

    metadata: Metadata
    lyrics: str


def read_answer(tokenizer: PlannerTokenizer, tokens: Sequence[int]) -> Answer:
    """Read a turn of the model. Its thought may be left open, because the turn ends where only metadata was asked for.

    Control tokens that the model spelt out letter by letter are taken out: no later stage may read them as commands.
    """
    inside = thought_of(tokenizer, tokens)
    end = tokenizer.controls[Control.END_THINK]
    after = list(tokens[tokens.index(end) + 1 :]) if end in tokens else []
    written = cot.parse(inside)
    words = {
        field.name: clean(value) or None
        for field in fields(written)
        if isinstance(value := getattr(written, field.name), str)
    }
    text = _decode(tokenizer, after)
    header = _HEADER.search(text[:_HEADER_WITHIN])
    return Answer(metadata=replace(written, **words), lyrics=clean(text[header.end() :] if header else text))


def thought_of(tokenizer: PlannerTokenizer, tokens: Sequence[int]) -> str:
    """Decode what stands between the tags so far."""
    end = tokenizer.controls[Control.END_THINK]
    return _decode(tokenizer, tokens[: tokens.index(end)] if end in tokens else tokens)


def clean(text: str) -> str:
    """Keep what a person could have typed."""
    typed = (char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cs"))
    return without_control_tokens("".join(typed).replace("\ufffd", "")).strip()


def _decode(tokenizer: PlannerTokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode([token for token in tokens if token in tokenizer.words])
