"""Musical words as people write them."""

import pytest

from soundstage_runtime.score import KEY_SCALES, LANGUAGES, TIME_SIGNATURES
from soundstage_runtime.spelling import spell_key_scale, spell_language, spell_time_signature


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("Am", "A minor"),
        ("A", "A major"),
        ("AM", "A major"),
        ("C Major", "C major"),
        ("c# minor", "C# minor"),
        ("B♭ major", "B♭ major"),
        ("bb min", "Bb minor"),
        ("bm", "B minor"),
        (" F♯MAJ ", "F♯ major"),
        ("H major", None),
        ("A minorish", None),
        ("C##", None),
        ("", None),
    ],
)
def test_keys(written: str, spelled: str | None) -> None:
    assert spell_key_scale(written) == spelled


@pytest.mark.parametrize(
    ("written", "spelled"),
    [("4/4", "4"), ("3 / 4", "3"), ("2/4", "2"), ("6/8", "6"), ("4", "4"), ("5/4", None), ("4/8", None), ("", None)],
)
def test_time_signatures(written: str, spelled: str | None) -> None:
    assert spell_time_signature(written) == spelled


def test_what_the_models_know_stays_as_it_is() -> None:
    assert [spell_key_scale(key) for key in KEY_SCALES] == list(KEY_SCALES)
    assert [spell_time_signature(name) for name in TIME_SIGNATURES] == list(TIME_SIGNATURES)
    assert [spell_language(name) for name in LANGUAGES] == list(LANGUAGES)
    assert (spell_language(" EN "), spell_language("tlh")) == ("en", None)
