"""The ways in which people write what the models know under one name."""

import re
from typing import Final

from soundstage_runtime.score import KEY_SCALES, LANGUAGES, TIME_SIGNATURES

# A lone letter says the mode by its case; a word in any case.
_KEY_SCALE: Final = re.compile(r"([A-Ga-g])\s*(#|♯|b|♭)?\s*(M|m|(?i:maj(?:or)?|min(?:or)?))?")
_TIME_SIGNATURES: Final = {**{name: name for name in TIME_SIGNATURES}, "2/4": "2", "3/4": "3", "4/4": "4", "6/8": "6"}


def spell_key_scale(text: str) -> str | None:
    """Spell a key ("Am", "C Major", "c#") as the models know it; None is no key. A bare note is major."""
    found = _KEY_SCALE.fullmatch(text.strip())
    if not found:
        return None
    note, accidental, mode = found.groups(default="")
    is_minor = mode == "m" or mode.lower().startswith("min")
    spelled = f"{note.upper()}{accidental} {'minor' if is_minor else 'major'}"
    return spelled if spelled in KEY_SCALES else None


def spell_time_signature(text: str) -> str | None:
    """Spell a time signature ("4/4", "6/8") as the number of beats in a bar; None is none that the models know."""
    return _TIME_SIGNATURES.get(re.sub(r"\s", "", text))


def spell_language(text: str) -> str | None:
    """Spell a language code in small letters; None is no language that can be sung."""
    language = text.strip().lower()
    return language if language in LANGUAGES else None
