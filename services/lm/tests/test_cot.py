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


@pytest.mark.parametrize(
    ("text", "metadata"),
    [
        ("\nlanguage: 'no'\n", Metadata(vocal_language="no")),
        ("\nlanguage: no\n", Metadata(vocal_language="no")),
        ("\ncaption: 'it''s: late'\n", Metadata(caption="it's: late")),
        ("\ncaption: 'it''s:\n  late'\n", Metadata(caption="it's: late")),
        ('\ncaption: "tab\\tand \\\n  break"\n', Metadata(caption="tab\tand break")),
        ("\ncaption: Title: x\n", Metadata(caption="Title: x")),
        ("\ncaption: 'tis late\n", Metadata(caption="'tis late")),
        ("\ncaption: 'a': b\n", Metadata(caption="'a': b")),
        ("\ncaption: 'a' # b\n", Metadata(caption="'a' # b")),
        ('\ncaption: "\\UFFFFFFFF"\n', Metadata(caption='"\\UFFFFFFFF"')),
        ('\ncaption: "\\z"\n', Metadata(caption='"\\z"')),
        ("\n\n", Metadata()),
        ("bpm: 90\n", Metadata(bpm=90)),
        ("\nbpm: fast\nduration: 9.5\ngenres: pop, rock\nkeyscale:\n", Metadata(genres="pop, rock")),
        ("\nmood: sad\n  very\nbpm: 90\n", Metadata(bpm=90)),
        ("", Metadata()),
    ],
)
def test_parses_what_a_model_may_write(text: str, metadata: Metadata) -> None:
    assert cot.parse(text) == metadata


def test_genres_are_never_told_to_the_model() -> None:
    assert cot.dump(Metadata(bpm=90, genres="pop")) == "\nbpm: 90\n"


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
