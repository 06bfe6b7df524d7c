import random
from collections.abc import Callable, Sequence

import pytest

from soundstage_lm import cot
from soundstage_lm.answer import read_answer, thought_of
from soundstage_lm.brief import Metadata
from soundstage_lm.grammar import PROSE_TOKENS, Grammar
from soundstage_lm.rules import CodesRule, ThoughtRule
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.writer import Constraint
from soundstage_runtime.score import KEY_SCALES, LANGUAGES, TIME_SIGNATURES
from soundstage_runtime.text import control_tokens
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS

DIGITS = list(range(15, 25))  # Qwen's ids of 0 to 9
NEWLINE, SPACE, COLON, END, END_THINK = 198, 220, 25, 151645, 151668
NOTHING = Metadata()
NUMBERS = ("bpm", "duration", "keyscale", "timesignature")
ALL = tuple(cot.KEYS)
PLANNED = tuple(key for key in ALL if key != "genres")


@pytest.fixture(scope="module")
def grammar(qwen: PlannerTokenizer) -> Grammar:
    return Grammar(qwen, max_duration_s=600)


def ids(constraint: Constraint) -> list[int]:
    allowed = constraint.allowed
    return allowed.ids.tolist() if allowed else []


def follow(constraint: Constraint, tokens: Sequence[int]) -> Constraint:
    for token in tokens:
        assert token in ids(constraint)
        constraint.advance(token)
    return constraint


def walk(constraint: Constraint, pick: Callable[[list[int]], int]) -> list[int]:
    tokens: list[int] = []
    while allowed := ids(constraint):
        tokens.append(pick(allowed))
        constraint.advance(tokens[-1])
    return tokens


def number(digits: str) -> list[int]:
    return [SPACE, *(15 + int(digit) for digit in digits)]


BPM = [151667, NEWLINE, 65, 5187, COLON]
DURATION = [*BPM, *number("90"), NEWLINE, 17021, COLON]
KEY_SCALE = [*DURATION, *number("30"), NEWLINE, 10563, 2246, COLON]
TIME_SIGNATURE = [*KEY_SCALE, 479, 3598, NEWLINE, 15136, 622, 1568, COLON]


@pytest.mark.parametrize(
    ("tokens", "allowed"),
    [
        ([], [151667]),
        (BPM[:1], [NEWLINE]),
        (BPM[:2], [65]),
        (BPM[:3], [5187]),
        (BPM[:4], [COLON]),
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
    rule = ThoughtRule(keys=NUMBERS, given=NOTHING)
    assert ids(follow(grammar.begin(rule), tokens)) == sorted(allowed)


@pytest.mark.parametrize(
    ("metadata", "line", "wanted"),
    [
        (Metadata(bpm=120), "bpm: 120\n", [65, 5187, 25, 220, 16, 17, 15, 198]),
        (Metadata(key_scale="G major"), "keyscale: G major\n", [10563, 2246, 25, 479, 3598, 198]),
        (Metadata(vocal_language="fr"), "language: fr\n", [11528, 25, 1422, 198]),
        (Metadata(vocal_language="yue"), "language: yue\n", [11528, 25, 379, 361, 198]),
        (Metadata(vocal_language="no"), "language: 'no'\n", [11528, 25, 364, 2152, 1248]),
        (Metadata(duration_s=7.9), "duration: 7\n", [17021, 25, 220, 22, 198]),
        (Metadata(time_signature="6"), "timesignature: 6\n", [15136, 622, 1568, 25, 220, 21, 198]),
    ],
)
def test_forces_what_the_user_fixed(
    grammar: Grammar, qwen: PlannerTokenizer, metadata: Metadata, line: str, wanted: list[int]
) -> None:
    tokens = walk(grammar.begin(ThoughtRule(keys=(*NUMBERS[:3], "language", NUMBERS[3]), given=metadata)), min)
    assert line in qwen.decode(tokens)
    assert ",".join(map(str, wanted)) in ",".join(map(str, tokens))


def test_a_free_language_is_the_likeliest_of_51(grammar: Grammar, qwen: PlannerTokenizer) -> None:
    constraint = follow(grammar.begin(ThoughtRule(keys=("language",), given=NOTHING)), [151667, NEWLINE, 11528, COLON])
    assert constraint.allowed is not None
    assert constraint.allowed.is_greedy
    assert len(constraint.allowed) == 51
    assert {662, 59748, 11937, 1422, 9788, 379} < set(ids(constraint))
    assert ids(follow(constraint, [379])) == [361]
    assert ids(follow(constraint, [361])) == [NEWLINE]


def test_only_languages_are_greedy(grammar: Grammar) -> None:
    constraint = grammar.begin(ThoughtRule(keys=NUMBERS, given=NOTHING))
    while allowed := constraint.allowed:
        assert not allowed.is_greedy
        constraint.advance(int(allowed.ids[0]))


def test_fields_come_in_the_order_of_training(grammar: Grammar, qwen: PlannerTokenizer) -> None:
    tokens = walk(grammar.begin(ThoughtRule(keys=ALL, given=NOTHING)), max)
    assert list(cot.read_fields(thought_of(qwen, tokens))) == list(cot.KEYS.values())


def test_tokens_are_those_of_the_whole_text(grammar: Grammar, qwen: PlannerTokenizer) -> None:
    given = Metadata(vocal_language="en")
    tokens = walk(grammar.begin(ThoughtRule(keys=(*NUMBERS[:3], "language", NUMBERS[3]), given=given)), min)
    inside = qwen.decode(tokens).removeprefix("<think>").removesuffix("<|im_end|>")
    assert tokens[1:-1] == qwen.encode(inside)


@pytest.mark.parametrize(
    "caption",
    [
        "calm piano",
        "Title: a song",
        "A calm piano.",
        "An upbeat and anthemic pop-rock track driven by bright, slightly overdriven electric guitars, "
        "a punchy rhythm section and soaring vocals.",
    ],
)
def test_allows_captions_as_the_training_text_has_them(grammar: Grammar, qwen: PlannerTokenizer, caption: str) -> None:
    metadata = Metadata(bpm=90, caption=caption, duration_s=30, key_scale="G major", time_signature="4")
    inside = qwen.encode(cot.dump(metadata))
    tokens = [151667, *inside, END]
    keys = ("bpm", "caption", "duration", "keyscale", "timesignature")
    assert ids(follow(grammar.begin(ThoughtRule(keys=keys, given=NOTHING)), tokens)) == []
    assert read_answer(qwen, tokens).metadata == metadata


def test_a_caption_begins_with_something_visible_and_holds_no_commands(
    grammar: Grammar, qwen: PlannerTokenizer
) -> None:
    constraint = follow(grammar.begin(ThoughtRule(keys=("caption",), given=NOTHING)), [151667, NEWLINE, 23347, COLON])
    text = {token: qwen.words[token] for token in ids(constraint)}
    assert SPACE in text
    assert all(word.startswith(b" ") and not word.startswith(b"  ") for word in text.values())
    inside = {qwen.words[token] for token in ids(follow(constraint, qwen.encode(" calm")))}
    assert {b"\n", b".\n", b" piano", b":", b"'"} < inside
    assert inside.isdisjoint({b"\n\n", b".\n\n", b"\r\n", b"\t", b"```", b"`", b"\x00", b"\r"})
    assert max(ids(constraint)) < 151643  # no control token, no code
    assert ids(follow(constraint, [NEWLINE])) == [SPACE, END]  # another line, or what follows


def test_lyrics_are_free_but_for_commands(grammar: Grammar, qwen: PlannerTokenizer) -> None:
    rule = ThoughtRule(keys=("timesignature",), given=Metadata(time_signature="4"), has_lyrics=True)
    constraint = grammar.begin(rule)
    while ids(constraint) != [END_THINK]:
        constraint.advance(ids(constraint)[0])
    follow(constraint, [END_THINK])
    assert {qwen.words.get(token, b"") for token in ids(constraint)} > {b"\n\n", b"`", b" "}
    assert [token for token in ids(constraint) if token >= 151643] == [END]
    assert ids(follow(constraint, [*qwen.encode("\n\n# Lyric\n[Verse]\nla la la\n"), END])) == []


@pytest.mark.parametrize(("duration_s", "count"), [(30.5, 152), (1.3, 6), (0.1, 0)])
def test_codes_are_counted_and_none_beyond_the_codebook(grammar: Grammar, duration_s: float, count: int) -> None:
    constraint = grammar.begin(CodesRule(count=int(duration_s * 5)))
    for step in range(count):
        assert constraint.allowed is not None
        assert (constraint.allowed.ids[0], constraint.allowed.ids[-1]) == (151_669, 215_668)
        assert len(constraint.allowed) == 64_000
        constraint.advance(151_669 + step)
    assert constraint.allowed is None


def test_texts_share_sets_but_no_state(byte_grammar: Grammar) -> None:
    rule = ThoughtRule(keys=ALL, given=NOTHING, has_lyrics=True)
    one, other, third = (byte_grammar.begin(rule) for _ in range(3))
    tokens = walk(one, max)
    assert ids(other) == ids(third) != []
    for token in tokens:
        assert other.allowed is third.allowed
        other.advance(token)
        third.advance(token)


def _lazy(allowed: list[int]) -> int:
    """Take short ways out: newlines and ends of turn wherever they are allowed."""
    return next((token for token in (NEWLINE, END) if token in allowed), allowed[0])


def random_given(source: random.Random) -> Metadata:
    def maybe(value: object) -> object:
        return value if source.random() < 0.3 else None

    values = {
        "bpm": maybe(source.randint(30, 300)),
        "duration_s": maybe(source.uniform(1, 600)),
        "key_scale": maybe(source.choice(KEY_SCALES)),
        "vocal_language": maybe(source.choice(LANGUAGES)),
        "time_signature": maybe(source.choice(TIME_SIGNATURES)),
    }
    return Metadata(**values)  # type: ignore[arg-type]


def check(tokenizer: PlannerTokenizer, rule: ThoughtRule, tokens: list[int]) -> None:
    """Check that a text parses back into a whole plan in which the user's values survive."""
    assert len(tokens) <= rule.max_tokens
    answer = read_answer(tokenizer, tokens)
    written, given = answer.metadata, rule.given
    assert list(cot.read_fields(thought_of(tokenizer, tokens))) == [cot.KEYS[key] for key in rule.keys]
    assert written.bpm == given.bpm if given.bpm else written.bpm in range(30, 301)
    assert written.duration_s == int(given.duration_s) if given.duration_s else written.duration_s in range(10, 601)
    assert written.key_scale == given.key_scale if given.key_scale else written.key_scale in KEY_SCALES
    assert written.time_signature in ((given.time_signature,) if given.time_signature else TIME_SIGNATURES)
    if "language" in rule.keys:
        assert written.vocal_language in ((given.vocal_language,) if given.vocal_language else LANGUAGES)
    for text, most in (
        (written.caption or "", MAX_CAPTION_CHARS),
        (written.genres or "", MAX_CAPTION_CHARS),
        (answer.lyrics, MAX_LYRICS_CHARS),
    ):
        assert len(text) <= most
        assert not control_tokens(text)
        text.encode()  # what is not Unicode could not be sent


def test_ten_thousand_random_walks_are_ten_thousand_plans(
    byte_grammar: Grammar, grammar: Grammar, qwen: PlannerTokenizer, byte_tokenizer: PlannerTokenizer
) -> None:
    source = random.Random(3)
    for index in range(10_000):
        tokenizer, chosen = (qwen, grammar) if index % 2 else (byte_tokenizer, byte_grammar)
        rule = ThoughtRule(keys=source.choice((PLANNED, NUMBERS)), given=random_given(source))
        tokens = random_walk(chosen.begin(rule), source, haste=source.choice((0.02, 0.1, 0.5)), tokenizer=tokenizer)
        check(tokenizer, rule, tokens)


@pytest.mark.parametrize("haste", [0.0, 0.01, 1.0])
def test_random_walks_through_all_fields_and_lyrics_end(
    grammar: Grammar, qwen: PlannerTokenizer, byte_grammar: Grammar, byte_tokenizer: PlannerTokenizer, haste: float
) -> None:
    source = random.Random(4)
    for tokenizer, chosen in ((qwen, grammar), (byte_tokenizer, byte_grammar)):
        for _ in range(20):
            rule = ThoughtRule(keys=ALL, given=random_given(source), has_lyrics=True)
            tokens = random_walk(chosen.begin(rule), source, haste=haste, tokenizer=tokenizer)
            check(tokenizer, rule, tokens)


@pytest.mark.parametrize("pick", [min, max, _lazy])
def test_a_model_that_always_writes_the_same_ends(
    grammar: Grammar, qwen: PlannerTokenizer, pick: Callable[[list[int]], int]
) -> None:
    rule = ThoughtRule(keys=ALL, given=NOTHING, has_lyrics=True)
    check(qwen, rule, walk(grammar.begin(rule), pick))


def random_walk(
    constraint: Constraint, source: random.Random, *, haste: float, tokenizer: PlannerTokenizer
) -> list[int]:
    """Walk at random; with a chance of `haste` a line, or the turn, ends as soon as it may."""
    exits = {token for token, word in tokenizer.words.items() if word == b"\n"} | set(tokenizer.controls.values())
    tokens: list[int] = []
    while allowed := constraint.allowed:
        token = int(allowed.ids[source.randrange(len(allowed))])
        if len(allowed) > 1 and source.random() < haste:
            token = next((way for way in exits if way in allowed.ids), token)
        tokens.append(token)
        constraint.advance(token)
    return tokens


@pytest.mark.parametrize(
    ("word", "count"),
    [
        (" B", sum(PROSE_TOKENS.values()) - 2 * 3),  # the last places are for the way out
        (" calm", 407 + PROSE_TOKENS["genres"] - 3),  # 407 * 5 characters leave no room for the longest word
    ],
)
def test_text_is_bounded_in_tokens_and_characters(
    grammar: Grammar, qwen: PlannerTokenizer, word: str, count: int
) -> None:
    [token] = qwen.encode(word)
    rule = ThoughtRule(keys=("caption", "genres"), given=NOTHING)
    tokens = walk(grammar.begin(rule), lambda allowed: token if token in allowed else allowed[0])
    assert tokens.count(token) == count
