from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundstage_lm import cot
from soundstage_lm.answer import read_answer
from soundstage_lm.brief import Metadata
from soundstage_lm.grammar import Grammar
from soundstage_lm.rules import ThoughtRule
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.weights import Checkpoint
from soundstage_lm.writer import Constraint
from soundstage_runtime.score import KEY_SCALES, LANGUAGES, TIME_SIGNATURES

DIGITS = list(range(15, 25))  # Qwen's ids of 0 to 9
NEWLINE, SPACE, END = 198, 220, 151645
NOTHING = Metadata()


@pytest.fixture(scope="module")
def grammar(qwen: PlannerTokenizer) -> Grammar:
    return Grammar(qwen, max_duration_s=600)


def rule(given: Metadata) -> ThoughtRule:
    keys = [key for key in cot.KEYS if key not in ("caption", "genres", "language") or getattr(given, cot.KEYS[key])]
    return ThoughtRule(keys=tuple(keys), given=given)


def ids(constraint: Constraint) -> list[int]:
    allowed = constraint.allowed
    return allowed.ids.tolist() if allowed else []


def follow(writing: Constraint, tokens: Sequence[int]) -> Constraint:
    for token in tokens:
        assert token in ids(writing)
        writing.advance(token)
    return writing


def number(digits: str) -> list[int]:
    return [SPACE, *(15 + int(digit) for digit in digits)]


BPM = [151667, NEWLINE, 65, 5187, 25]
DURATION = [*BPM, *number("90"), NEWLINE, 17021, 25]
KEY_SCALE = [*DURATION, *number("30"), NEWLINE, 10563, 2246, 25]
TIME_SIGNATURE = [*KEY_SCALE, 479, 3598, NEWLINE, 15136, 622, 1568, 25]


@pytest.mark.parametrize(
    ("tokens", "allowed"),
    [
        ([], [151667]),
        (BPM[:1], [NEWLINE]),
        (BPM[:2], [65]),
        (BPM[:3], [5187]),
        (BPM[:4], [25]),
        (BPM, [SPACE]),
        ([*BPM, SPACE], DIGITS[1:]),
        ([*BPM, *number("3")], DIGITS),
        ([*BPM, *number("30")], [DIGITS[0], NEWLINE]),
        ([*BPM, *number("31")], [NEWLINE]),
        ([*BPM, *number("29")], DIGITS),
        ([*BPM, *number("300")], [NEWLINE]),
        ([*DURATION, *number("10")], [*DIGITS, NEWLINE]),
        ([*DURATION, *number("60")], [DIGITS[0], NEWLINE]),
        ([*DURATION, *number("600")], [NEWLINE]),
        ([*DURATION, *number("7")], DIGITS),
        ([*DURATION, *number("100")], [NEWLINE]),
        (KEY_SCALE, [356, 362, 422, 425, 434, 468, 479, 3680, 11988, 25570]),
        ([*KEY_SCALE, 425], [2, 65, 3598, 8922, 145346, 145761]),
        ([*KEY_SCALE, 468], [2, 3598, 8922, 145346, 145761]),
        ([*KEY_SCALE, 3680, 8922], [NEWLINE]),
        ([*TIME_SIGNATURE, SPACE], [17, 18, 19, 21]),
        ([*TIME_SIGNATURE, SPACE, 19], [NEWLINE]),
        ([*TIME_SIGNATURE, SPACE, 19, NEWLINE], [END]),
        ([*TIME_SIGNATURE, SPACE, 19, NEWLINE, END], []),
    ],
)
def test_allows_qwens_tokens(grammar: Grammar, tokens: list[int], allowed: list[int]) -> None:
    assert ids(follow(grammar.begin(rule(NOTHING)), tokens)) == sorted(allowed)


@pytest.mark.parametrize(
    ("metadata", "line", "wanted"),
    [
        (Metadata(bpm=120), "bpm: 120\n", [65, 5187, 25, 220, 16, 17, 15, 198]),
        (Metadata(key_scale="G major"), "keyscale: G major\n", [10563, 2246, 25, 479, 3598, 198]),
        (Metadata(vocal_language="fr"), "language: fr\n", [11528, 25, 1422, 198]),
        (Metadata(vocal_language="yue"), "language: yue\n", [11528, 25, 379, 361, 198]),
        (Metadata(duration_s=7.9), "duration: 7\n", [17021, 25, 220, 22, 198]),
    ],
)
def test_forces_what_the_user_fixed(
    grammar: Grammar, qwen: PlannerTokenizer, metadata: Metadata, line: str, wanted: list[int]
) -> None:
    tokens = write_greedily(grammar.begin(rule(metadata)))
    assert line in qwen.decode(tokens)
    assert ",".join(map(str, wanted)) in ",".join(map(str, tokens))


def test_tokens_are_those_of_the_whole_text(grammar: Grammar, qwen: PlannerTokenizer) -> None:
    tokens = write_greedily(grammar.begin(rule(Metadata(vocal_language="en"))))
    inside = qwen.decode(tokens).removeprefix("<think>").removesuffix("<|im_end|>")
    assert tokens[1:-1] == qwen.encode(inside)


def write_greedily(writing: Constraint) -> list[int]:
    tokens: list[int] = []
    while allowed := ids(writing):
        tokens.append(allowed[0])
        writing.advance(tokens[-1])
    return tokens


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    fixed=st.builds(
        Metadata,
        bpm=st.none() | st.integers(30, 300),
        duration_s=st.none() | st.floats(1, 600),
        key_scale=st.none() | st.sampled_from(KEY_SCALES),
        vocal_language=st.none() | st.sampled_from(LANGUAGES),
        time_signature=st.none() | st.sampled_from(TIME_SIGNATURES),
    ),
)
def test_every_allowed_path_ends_in_legal_metadata(
    checkpoint: Checkpoint, byte_grammar: Grammar, data: st.DataObject, fixed: Metadata
) -> None:
    writing, tokens = byte_grammar.begin(rule(fixed)), list[int]()
    while allowed := ids(writing):
        tokens.append(data.draw(st.sampled_from(allowed)))
        writing.advance(tokens[-1])
    text = checkpoint.tokenizer.decode(tokens)
    written = read_answer(checkpoint.tokenizer, tokens).metadata
    assert text.startswith("<think>\nbpm: ")
    assert text.endswith("\n<|im_end|>")
    assert written.bpm == fixed.bpm if fixed.bpm else written.bpm in range(30, 301)
    assert written.duration_s == int(fixed.duration_s) if fixed.duration_s else written.duration_s in range(10, 601)
    assert written.key_scale == fixed.key_scale if fixed.key_scale else written.key_scale in KEY_SCALES
    assert written.time_signature == fixed.time_signature or written.time_signature in TIME_SIGNATURES
    assert written.vocal_language == fixed.vocal_language


def test_two_texts_share_no_state(byte_grammar: Grammar) -> None:
    one, other = byte_grammar.begin(rule(NOTHING)), byte_grammar.begin(rule(NOTHING))
    before = ids(other)
    one.advance(ids(one)[0])
    assert ids(other) == before != ids(one)
