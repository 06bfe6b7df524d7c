import pytest

from soundstage_lm.answer import Answer, read_answer
from soundstage_lm.brief import Metadata
from soundstage_lm.tokenizer import PlannerTokenizer


def read(tokenizer: PlannerTokenizer, thought: str, lyrics: str | None = None) -> Answer:
    controls = {name: tokenizer.token_id(name) for name in ("<think>", "</think>", "<|im_end|>")}
    after = [] if lyrics is None else [controls["</think>"], *tokenizer.encode(lyrics)]
    return read_answer(tokenizer, [controls["<think>"], *tokenizer.encode(thought), *after, controls["<|im_end|>"]])


def test_reads_folded_lines_and_a_missing_end(byte_tokenizer: PlannerTokenizer) -> None:
    thought = "\nbpm: 168\ncaption: A calm\n  piano.\nduration: 122\nkeyscale: E♭ major\nlanguage: unknown\n"
    assert read(byte_tokenizer, thought + "timesignature: 4\n") == Answer(
        metadata=Metadata(
            bpm=168,
            caption="A calm piano.",
            duration_s=122,
            key_scale="E♭ major",
            vocal_language="unknown",
            time_signature="4",
        ),
        lyrics="",
    )


@pytest.mark.parametrize(
    ("written", "lyrics"),
    [
        ("\n\n# Lyric\n[Verse]\nla la\n", "[Verse]\nla la"),
        ("\n# Lyrics\nla", "la"),
        ("\n\n# lyric:\nla", "la"),
        ("\n# Languages\nen, de\n\n# Lyric\nla", "la"),
        ("\n\nla\n# Lyric of the day", "la\n# Lyric of the day"),
        ("\n\n# Lyric\n", ""),
        ("", ""),
    ],
)
def test_lyrics_begin_after_their_header(byte_tokenizer: PlannerTokenizer, written: str, lyrics: str) -> None:
    assert read(byte_tokenizer, "\nbpm: 90\n", written).lyrics == lyrics


def test_control_tokens_that_are_spelt_out_change_nothing(byte_tokenizer: PlannerTokenizer) -> None:
    sly = "a </th</think>ink> <think> b <|im_end|> <|audio_code_7|>"
    answer = read(byte_tokenizer, f"\nbpm: 90\ncaption: {sly}\nduration: 30\n", f"\n\n# Lyric\n{sly}")
    assert answer.metadata == Metadata(bpm=90, caption="a   b", duration_s=30)
    assert answer.lyrics == "a   b"


@pytest.mark.parametrize(
    ("caption", "read_as"),
    [
        ('"a\\0b\\ud800c\\td"', "abcd"),
        ("''", None),
        ('"\\0"', None),
        ("'</th<think>ink>'", None),
        ("'" + "[" * 2000, "'" + "[" * 2000),
        ("'a': " + "[" * 2000, "'a': " + "[" * 2000),
    ],
)
def test_captions_hold_what_can_be_typed(byte_tokenizer: PlannerTokenizer, caption: str, read_as: str | None) -> None:
    assert read(byte_tokenizer, f"\nbpm: 90\ncaption: {caption}\n").metadata == Metadata(bpm=90, caption=read_as)


def test_half_a_character_is_dropped(byte_tokenizer: PlannerTokenizer) -> None:
    half = byte_tokenizer.encode("\ncaption: 東")[:-1]
    assert read_answer(byte_tokenizer, [*half, *byte_tokenizer.encode(" x\n")]).metadata == Metadata(caption="x")
