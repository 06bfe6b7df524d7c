import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundstage_lm import cot
from soundstage_lm.brief import Metadata
from soundstage_runtime.score import KEY_SCALES, LANGUAGES, TIME_SIGNATURES
from soundstage_runtime.text import control_tokens

FOLDED = (
    "An upbeat and anthemic pop-rock track driven by bright, slightly overdriven electric guitars, "
    "a punchy rhythm section and soaring vocals."
)


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (
            Metadata(
                bpm=120,
                caption="calm piano",
                duration_s=30,
                key_scale="G major",
                vocal_language="en",
                time_signature="4/4",
            ),
            "bpm: 120\ncaption: calm piano\nduration: 30\nkeyscale: G major\nlanguage: en\ntimesignature: 4",
        ),
        (Metadata(), ""),
        (Metadata(key_scale="F# minor", time_signature="6/8"), "keyscale: F# minor\ntimesignature: 6/8"),
        (Metadata(vocal_language="no", key_scale="B♭ major"), "keyscale: B♭ major\nlanguage: 'no'"),
        (Metadata(caption="Title: a song"), "caption: 'Title: a song'"),
        (
            Metadata(caption=FOLDED),
            "caption: An upbeat and anthemic pop-rock track driven by bright, slightly overdriven\n"
            "  electric guitars, a punchy rhythm section and soaring vocals.",
        ),
        (Metadata(duration_s=30.9), "duration: 30"),
    ],
)
def test_dumps_the_trained_text(metadata: Metadata, text: str) -> None:
    assert cot.dump(metadata) == f"\n{text}\n"


def test_parses_folded_lines_and_a_missing_end() -> None:
    text = (
        "<think>\nbpm: 168\ncaption: A calm\n  piano.\nduration: 122\nkeyscale: E♭ major\nlanguage: unknown\n"
        "timesignature: 4\n<|im_end|>"
    )
    assert cot.parse(text) == Metadata(
        bpm=168,
        caption="A calm piano.",
        duration_s=122,
        key_scale="E♭ major",
        vocal_language="unknown",
        time_signature="4",
    )


@pytest.mark.parametrize(
    ("text", "metadata"),
    [
        ("<think>\nlanguage: 'no'\n</think>", Metadata(vocal_language="no")),
        ("<think>\nlanguage: no\n</think>", Metadata(vocal_language="no")),
        ("<think>\ncaption: 'it''s: late'\n</think>", Metadata(caption="it's: late")),
        ("<think>\ncaption: Title: x\n</think>", Metadata(caption="Title: x")),
        ("<think>\ncaption: 'tis late\n</think>", Metadata(caption="'tis late")),
        ("<think>\ncaption: 'a': b\n</think>", Metadata(caption="'a': b")),
        ("<think>\n\n</think>\n\n<|audio_code_3|>", Metadata()),
        ("bpm: 90\n<|audio_code_3|>bpm: 80", Metadata(bpm=90)),
        ("<think>\nbpm: fast\nduration: 9.5\ngenres: pop\nkeyscale:\n", Metadata()),
        ("", Metadata()),
    ],
)
def test_parses_what_a_model_may_write(text: str, metadata: Metadata) -> None:
    assert cot.parse(text) == metadata


captions = (
    st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp"), whitelist_characters="\n"), min_size=1)
    .filter(lambda caption: not control_tokens(caption))
    .filter(lambda caption: caption == caption.strip())  # the text is stripped at its end, as in training
    .filter(lambda caption: not caption.isdigit())  # digits become a number, whose leading zeros are lost
)


@settings(deadline=None)
@given(
    st.builds(
        Metadata,
        bpm=st.none() | st.integers(30, 300),
        caption=st.none() | captions,
        duration_s=st.none() | st.integers(1, 600).map(float),
        key_scale=st.none() | st.sampled_from(KEY_SCALES),
        vocal_language=st.none() | st.sampled_from(LANGUAGES),
        time_signature=st.none() | st.sampled_from(TIME_SIGNATURES),
    )
)
def test_parses_all_that_it_dumps(metadata: Metadata) -> None:
    assert cot.parse(cot.dump(metadata)) == metadata
