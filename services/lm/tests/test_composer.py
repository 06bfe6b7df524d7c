"""The flow of the modes, on writers that need no network."""

import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from soundstage_lm import cot
from soundstage_lm.brief import Brief, CodeRun, Field, Idea, Listening, Metadata, Plan, Rough, Sampling
from soundstage_lm.composer import Composer
from soundstage_lm.grammar import Grammar
from soundstage_lm.prompts import codes_prompt, metadata_prompt, render, unguided_prompt
from soundstage_lm.rules import CodesRule, ThoughtRule
from soundstage_lm.sampling import draw, guide, uniform
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.writer import Text, TokenSet
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.score import KEY_SCALES, LANGUAGES, TIME_SIGNATURES

FIXED = Metadata(bpm=90, key_scale="G major", time_signature="4", duration_s=2.5)
WRITTEN = Metadata(
    bpm=120,
    caption="Soft: a lullaby, sung low and slow over a felt piano and the hum of a house that has gone to sleep",
    duration_s=12,
    genres="lullaby, ambient",
    key_scale="F# minor",
    vocal_language="no",
    time_signature="3",
)
BRIEF = Brief(caption="chill", lyrics="la", metadata=Metadata(), seed=7, sampling=Sampling())
LYRICS = "[Verse]\nla la la"


@dataclass(kw_only=True)
class Reciter:
    """Writes a fixed song under any rule, and keeps what it was asked."""

    grammar: Grammar
    tokenizer: PlannerTokenizer
    song: Metadata = WRITTEN
    lyrics: str = LYRICS
    asked: list[Text] = field(default_factory=list[Text])
    num_live: int = 0

    async def write(self, text: Text) -> AsyncGenerator[int, None]:
        self.asked.append(text)
        self.num_live += 1
        try:
            constraint = self.grammar.begin(text.rule)
            for token in self._recite(text):
                assert constraint.allowed is not None
                assert token in constraint.allowed.ids
                constraint.advance(token)
                yield token
            assert constraint.allowed is None
        finally:
            self.num_live -= 1

    def _recite(self, text: Text) -> list[int]:
        rule = text.rule
        if isinstance(rule, CodesRule):
            return self.tokenizer.code_ids[np.arange(rule.count) % 1000].tolist()
        controls = {name: self.tokenizer.token_id(name) for name in ("<think>", "</think>", "<|im_end|>")}
        values = {
            key: next(value for song in (rule.given, self.song) if (value := getattr(song, cot.KEYS[key])) is not None)
            for key in rule.keys
        }
        thought = "\n" + "".join(cot.line(key, value) for key, value in values.items())
        after = [controls["</think>"], *self.tokenizer.encode(f"\n\n# Lyric\n{self.lyrics}\n")]
        return [
            *(controls["<think>"], *self.tokenizer.encode(thought)),
            *(after if rule.has_lyrics else []),
            controls["<|im_end|>"],
        ]


class Noise:
    """Draws from logits that a seed, and nothing else, decides."""

    num_live = 0

    def __init__(self, grammar: Grammar, logits: Callable[[np.random.Generator, TokenSet], np.ndarray]) -> None:
        self._grammar, self._logits = grammar, logits

    async def write(self, text: Text) -> AsyncGenerator[int, None]:
        constraint = self._grammar.begin(text.rule)
        source = np.random.default_rng((text.seed, text.phase))
        position = 0
        while allowed := constraint.allowed:
            rows = [torch.from_numpy(self._logits(source, allowed)) for _ in text.prompts]
            guided = guide(rows[0], rows[-1], text.sampling.guidance_scale) if len(rows) > 1 else rows[0]
            token = int(allowed.ids[draw(guided, text.sampling, uniform(text.seed, text.phase, position))])
            constraint.advance(token)
            position += 1
            yield token


@pytest.fixture
def reciter(byte_grammar: Grammar, byte_tokenizer: PlannerTokenizer) -> Reciter:
    return Reciter(grammar=byte_grammar, tokenizer=byte_tokenizer)


def make_composer(writer: Reciter | Noise, tokenizer: PlannerTokenizer, max_tokens: int = 40_960) -> Composer:
    return Composer(writer, tokenizer, fingerprint="f", max_duration_s=600, max_tokens=max_tokens)


@pytest.fixture
def composer(reciter: Reciter, byte_tokenizer: PlannerTokenizer) -> Composer:
    return make_composer(reciter, byte_tokenizer)


async def collect(composer: Composer, brief: Brief) -> tuple[list[Field], Plan, list[int]]:
    pieces = [piece async for piece in composer.compose(brief)]
    [plan] = [piece for piece in pieces if isinstance(piece, Plan)]
    before, after = pieces[: pieces.index(plan)], pieces[pieces.index(plan) + 1 :]
    codes: list[int] = []
    for run in after:
        assert isinstance(run, CodeRun)
        assert run.first_code == len(codes)
        codes += run.codes
    return [piece for piece in before if isinstance(piece, Field)], plan, codes


def told(reciter: Reciter, index: int, prompt: int = 0) -> str:
    return reciter.tokenizer.decode(list(reciter.asked[index].prompts[prompt]))


async def test_plans_in_two_texts(composer: Composer, reciter: Reciter) -> None:
    _, plan, codes = await collect(composer, BRIEF)
    assert plan.metadata == replace(WRITTEN, genres=None)
    assert len(codes) == plan.code_count == 60
    assert [text.phase for text in reciter.asked] == [0, 1]
    assert len(reciter.asked[0].prompts) == 1  # guidance on words cuts captions short
    assert told(reciter, 0) == render(metadata_prompt("chill", "la"))
    # The user's own caption is asked with; the model's stands in its thought.
    assert told(reciter, 1) == render(codes_prompt("chill", "la", plan.metadata))
    assert told(reciter, 1, prompt=1) == render(unguided_prompt(""))


async def test_without_guidance_there_is_no_second_prompt(composer: Composer, reciter: Reciter) -> None:
    await collect(composer, replace(BRIEF, metadata=FIXED, sampling=Sampling(guidance_scale=1)))
    assert [len(text.prompts) for text in reciter.asked] == [1]


async def test_says_where_each_field_comes_from_before_the_plan(composer: Composer) -> None:
    given = Metadata(bpm=100, vocal_language="fr", duration_s=30.5)
    settled, plan, codes = await collect(composer, replace(BRIEF, metadata=given))
    assert [(piece.name, piece.value, piece.is_given) for piece in settled] == [
        ("bpm", "100", True),
        ("caption", WRITTEN.caption, False),
        ("duration_s", "30", True),
        ("key_scale", "F# minor", False),
        ("vocal_language", "fr", True),
        ("time_signature", "3", False),
    ]
    assert plan.fields == tuple(settled)
    assert plan.metadata == replace(WRITTEN, bpm=100, vocal_language="fr", duration_s=30.5, genres=None)
    assert len(codes) == 152


async def test_a_caption_of_which_nothing_is_left_is_none(composer: Composer, reciter: Reciter) -> None:
    reciter.song = replace(WRITTEN, caption="<|im_end|>")
    settled, plan, _ = await collect(composer, BRIEF)
    assert plan.metadata.caption is None
    assert [piece.name for piece in settled] == [
        *("bpm", "duration_s", "key_scale", "vocal_language", "time_signature")
    ]


async def test_a_field_comes_as_soon_as_the_next_one_is_named(composer: Composer, reciter: Reciter) -> None:
    written: list[int] = []
    write = reciter.write

    class Counter(Reciter):
        async def write(self, text: Text) -> AsyncGenerator[int, None]:
            async for token in write(text):
                written.append(token)
                yield token

    counter = Counter(grammar=reciter.grammar, tokenizer=reciter.tokenizer)
    pieces = make_composer(counter, reciter.tokenizer).compose(BRIEF)
    first = await anext(pieces)
    await pieces.aclose()
    assert isinstance(first, Field)
    assert reciter.tokenizer.decode(written) == "<think>\nbpm: 120\ncaption:"


@pytest.mark.parametrize(
    ("switches", "keys"),
    [
        ({}, ("bpm", "caption", "duration", "keyscale", "language", "timesignature")),
        ({"rewrite_caption": False}, ("bpm", "duration", "keyscale", "language", "timesignature")),
        ({"detect_language": False}, ("bpm", "caption", "duration", "keyscale", "timesignature")),
    ],
)
async def test_writes_the_fields_that_are_asked_for(
    composer: Composer, reciter: Reciter, switches: dict[str, bool], keys: tuple[str, ...]
) -> None:
    _, plan, _ = await collect(composer, replace(BRIEF, **switches))
    assert reciter.asked[0].rule == ThoughtRule(keys=keys, given=Metadata())
    assert (plan.metadata.caption is None) == ("caption" not in keys)
    assert (plan.metadata.vocal_language is None) == ("language" not in keys)


async def test_a_language_of_the_user_is_written_though_none_is_detected(composer: Composer) -> None:
    brief = replace(BRIEF, metadata=Metadata(vocal_language="en"), detect_language=False)
    _, plan, _ = await collect(composer, brief)
    assert plan.metadata.vocal_language == "en"


async def test_a_plan_without_codes_ends_with_the_plan(composer: Composer, reciter: Reciter) -> None:
    _, plan, codes = await collect(composer, replace(BRIEF, write_codes=False))
    assert (plan.code_count, codes, len(reciter.asked)) == (0, [], 1)


@pytest.mark.parametrize("brief", [BRIEF, replace(BRIEF, write_metadata=False)])
async def test_an_edited_plan_is_taken_as_it_is(composer: Composer, reciter: Reciter, brief: Brief) -> None:
    settled, plan, codes = await collect(composer, replace(brief, metadata=FIXED))
    assert (settled, plan.metadata, len(codes)) == ([], FIXED, 12)
    assert all(found.is_given for found in plan.fields)
    assert len(plan.fields) == 4
    assert told(reciter, 0) == render(codes_prompt("chill", "la", FIXED))


async def test_metadata_stay_missing_where_none_are_written(composer: Composer, reciter: Reciter) -> None:
    brief = replace(BRIEF, write_metadata=False)
    _, plan, codes = await collect(composer, replace(brief, metadata=Metadata(duration_s=1)))
    assert (plan.metadata, len(codes)) == (Metadata(duration_s=1), 5)
    assert "<think>\nduration: 1\n</think>" in told(reciter, 0)
    _, plan, codes = await collect(composer, replace(brief, write_codes=False))
    assert (plan.metadata, codes) == (Metadata(), [])


async def test_codes_of_unknown_length_are_refused(composer: Composer, reciter: Reciter) -> None:
    with pytest.raises(InvalidRequestError, match=r"metadata\.duration_s is not set"):
        await collect(composer, replace(BRIEF, write_metadata=False))
    assert reciter.asked == []


async def test_closing_a_song_closes_its_text(composer: Composer, reciter: Reciter) -> None:
    for count in (1, 3, 8):
        pieces = composer.compose(BRIEF)
        for _ in range(count):
            await anext(pieces)
        assert reciter.num_live == 1
        await pieces.aclose()
        assert reciter.num_live == 0


async def test_describes_codes(composer: Composer, reciter: Reciter) -> None:
    song = await composer.understand(Listening(codes=(0, 999, 5), seed=1, sampling=Sampling()))
    assert song.metadata == replace(WRITTEN, duration_s=1)
    assert song.lyrics == LYRICS
    assert "user\n<|audio_code_0|><|audio_code_999|><|audio_code_5|><|im_end|>" in told(reciter, 0)
    assert len(reciter.asked[0].prompts) == 1


async def test_refuses_codes_that_the_model_has_not(composer: Composer, reciter: Reciter) -> None:
    with pytest.raises(InvalidRequestError, match="codes holds 1000, which is no code"):
        await composer.understand(Listening(codes=(0, 1000), seed=1, sampling=Sampling()))
    assert reciter.asked == []


@pytest.mark.parametrize(("written", "lyrics"), [(LYRICS, LYRICS), ("", "[Instrumental]")])
async def test_drafts_a_song(composer: Composer, reciter: Reciter, written: str, lyrics: str) -> None:
    reciter.lyrics = written
    idea = Idea(query="a lullaby", is_instrumental=True, vocal_language="de", seed=1, sampling=Sampling())
    song = await composer.draft(idea)
    assert song.metadata == replace(WRITTEN, vocal_language="de")
    assert song.lyrics == lyrics
    assert "user\na lullaby\n\ninstrumental: true<|im_end|>" in told(reciter, 0)


@pytest.mark.parametrize(("written", "lyrics"), [(LYRICS, LYRICS), ("", "old words")])
async def test_polishes_a_song(composer: Composer, reciter: Reciter, written: str, lyrics: str) -> None:
    reciter.lyrics = written
    given = Metadata(bpm=77, vocal_language="yue")
    rough = Rough(caption="old", lyrics="old words", metadata=given, seed=1, sampling=Sampling())
    song = await composer.polish(rough)
    assert song.metadata == replace(WRITTEN, bpm=77, vocal_language="yue")
    assert song.lyrics == lyrics
    assert "user\n# Caption\nold\n\n# Lyric\nold words<|im_end|>" in told(reciter, 0)


async def test_words_without_room_are_refused_before_any_token(
    reciter: Reciter, byte_tokenizer: PlannerTokenizer
) -> None:
    composer = make_composer(reciter, byte_tokenizer, max_tokens=8192)
    words = "la " * 2000  # a byte is a token here
    with pytest.raises(InvalidRequestError, match=r"lyrics are .* leave room for"):
        await collect(composer, replace(BRIEF, lyrics=words))
    with pytest.raises(InvalidRequestError, match=r"lyrics is .* has room for"):
        await composer.polish(Rough(caption="", lyrics=words, metadata=Metadata(), seed=1, sampling=Sampling()))
    with pytest.raises(InvalidRequestError, match=r"query is .* has room for"):
        await composer.draft(Idea(query=words, is_instrumental=False, vocal_language=None, seed=1, sampling=Sampling()))
    assert reciter.asked == []


async def test_songs_of_600_s_fit_into_8192_tokens(qwen: PlannerTokenizer) -> None:
    reciter = Reciter(grammar=Grammar(qwen, max_duration_s=600), tokenizer=qwen)
    composer = make_composer(reciter, qwen, max_tokens=8192)
    await collect(composer, replace(BRIEF, lyrics="la la la\n" * 400, metadata=Metadata(duration_s=600)))
    song = await composer.understand(Listening(codes=tuple(range(3000)), seed=1, sampling=Sampling()))
    assert song.metadata.duration_s == 600
    assert all(len(text.prompts[0]) + text.rule.max_tokens <= 8192 for text in reciter.asked)


def only(value: float) -> Callable[[np.random.Generator, TokenSet], np.ndarray]:
    return lambda source, allowed: np.full(len(allowed), value, dtype=np.float32)


def spiked(source: np.random.Generator, allowed: TokenSet) -> np.ndarray:
    """Put all mass on one token, and nothing but -inf beside it."""
    logits = np.full(len(allowed), -np.inf, dtype=np.float32)
    logits[source.integers(len(allowed))] = 30
    return logits


def broken(source: np.random.Generator, allowed: TokenSet) -> np.ndarray:
    """Mix numbers with what is none."""
    logits = source.normal(scale=1e4, size=len(allowed)).astype(np.float32)
    strange = np.array([np.nan, np.inf, -np.inf, 3e38], dtype=np.float32)
    return np.where(source.random(len(allowed)) < 0.5, source.choice(strange, len(allowed)), logits)


def ending(tokenizer: PlannerTokenizer) -> Callable[[np.random.Generator, TokenSet], np.ndarray]:
    """Put all mass on the end of the turn, which is seldom allowed."""
    end = tokenizer.token_id("<|im_end|>")
    return lambda source, allowed: np.where(allowed.ids == end, 1e9, source.normal(size=len(allowed))).astype(
        np.float32
    )


@pytest.mark.parametrize("kind", ["flat", "-inf", "nan", "inf", "spiked", "broken", "ending"])
async def test_whatever_the_logits_a_plan_is_whole_and_its_codes_are_counted(
    byte_grammar: Grammar, byte_tokenizer: PlannerTokenizer, kind: str
) -> None:
    logits = {
        "flat": only(0),
        "-inf": only(-np.inf),
        "nan": only(np.nan),
        "inf": only(np.inf),
        "spiked": spiked,
        "broken": broken,
        "ending": ending(byte_tokenizer),
    }[kind]
    composer = make_composer(Noise(byte_grammar, logits), byte_tokenizer)
    source = random.Random(kind)
    samplings: Sequence[Sampling] = (
        Sampling(),
        Sampling(temperature=0, guidance_scale=1),
        Sampling(temperature=2, top_p=1, top_k=3, guidance_scale=10),
    )
    for seed, sampling in enumerate(samplings):
        given = Metadata(bpm=source.randint(30, 300), duration_s=source.uniform(1, 20))
        settled, plan, codes = await collect(composer, replace(BRIEF, metadata=given, seed=seed, sampling=sampling))
        metadata = plan.metadata
        assert (metadata.bpm, metadata.duration_s) == (given.bpm, given.duration_s)
        assert len(codes) == plan.code_count == int((given.duration_s or 0) * 5)
        assert metadata.key_scale in KEY_SCALES
        assert metadata.time_signature in TIME_SIGNATURES
        assert metadata.vocal_language in LANGUAGES
        assert [found.name for found in settled if found.is_given] == ["bpm", "duration_s"]
