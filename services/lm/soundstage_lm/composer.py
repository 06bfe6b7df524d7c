"""The planner's modes: which texts a request takes, and what is made of them, whatever engine writes them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Final

from soundstage_lm import cot, scoring
from soundstage_lm.answer import Answer, clean, read_answer, thought_of
from soundstage_lm.brief import (
    Brief,
    Claim,
    CodeRun,
    Field,
    Idea,
    Likelihood,
    Listening,
    Metadata,
    Plan,
    Request,
    Rough,
    Song,
)
from soundstage_lm.prompts import (
    Prompt,
    codes_prompt,
    draft_prompt,
    metadata_prompt,
    polish_prompt,
    understand_prompt,
    unguided_prompt,
)
from soundstage_lm.rules import CodesRule, Rule, ThoughtRule
from soundstage_lm.scoring import Judge, ScoringUnavailableError
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.writer import Text, Writer
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import CODE_RATE_HZ, INSTRUMENTAL

CODES_PER_RUN: Final = 5  # one second of music
_WORDS_PHASE, _CODES_PHASE = 0, 1


class Composer:
    """Plans songs. Songs share the writer and nothing else."""

    def __init__(
        self,
        writer: Writer,
        tokenizer: PlannerTokenizer,
        *,
        fingerprint: str,
        max_duration_s: int,
        max_tokens: int,
        judge: Judge | None = None,
    ) -> None:
        """Take an engine, and the tokens that it can hold of one text, prompt and answer together.

        `judge` is None where the engine cannot score.
        """
        self._writer, self._tokenizer = writer, tokenizer
        self._max_duration_s, self._max_tokens = max_duration_s, max_tokens
        self._judge = judge
        self.fingerprint = fingerprint

    async def compose(self, brief: Brief) -> AsyncGenerator[Field | Plan | CodeRun, None]:
        """Yield each field as it is settled, then the plan, then all its codes in order.

        Closing the generator stops the model before its next token. Raises InvalidRequestError when a duration is
        wanted and nobody gives one, or when the words leave the model no room for the song.
        """
        is_thinking = brief.write_metadata and not brief.metadata.is_complete
        if brief.write_codes and not is_thinking and brief.metadata.duration_s is None:
            raise _refusal("metadata.duration_s", "is not set; it is needed for codes when write_metadata is false")
        await self._check_room(brief, is_thinking=is_thinking)
        metadata, settled = brief.metadata, _given_fields(brief.metadata)
        if is_thinking:
            settled = ()
            async with aclosing(self._think(brief)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Metadata):
                        metadata = _fill(brief.metadata, piece)
                    elif piece.value:  # nothing may be left of a caption
                        settled = (*settled, piece)
                        yield piece
        count = int((metadata.duration_s or 0) * CODE_RATE_HZ) if brief.write_codes else 0
        yield Plan(metadata=metadata, fields=settled, code_count=count)
        if count:
            async with aclosing(self._write_codes(brief, metadata, count)) as runs:
                async for run in runs:
                    yield run

    async def understand(self, listening: Listening) -> Song:
        """Describe what codes sound like. Raises InvalidRequestError when the model has none such, or no room."""
        self._check_codes(listening.codes)
        heard = Metadata(duration_s=max(1.0, len(listening.codes) / CODE_RATE_HZ))
        answer = await self._describe(listening, understand_prompt(listening.codes), heard, field="codes")
        return Song(metadata=_fill(heard, answer.metadata), lyrics=answer.lyrics)

    async def draft(self, idea: Idea) -> Song:
        """Make a song's text of a few words. Raises InvalidRequestError when they are more than the model can hold."""
        given = Metadata(vocal_language=idea.vocal_language)
        prompt = draft_prompt(idea.query, is_instrumental=idea.is_instrumental)
        answer = await self._describe(idea, prompt, given, field="query")
        lyrics = answer.lyrics or (INSTRUMENTAL if idea.is_instrumental else "")
        return Song(metadata=_fill(given, answer.metadata), lyrics=lyrics)

    async def polish(self, rough: Rough) -> Song:
        """Write a song's text better. Raises InvalidRequestError when it is more than the model can hold."""
        prompt = polish_prompt(rough.caption, rough.lyrics)
        answer = await self._describe(rough, prompt, rough.metadata, field="lyrics")
        metadata = _fill(rough.metadata, answer.metadata)
        return Song(
            metadata=replace(metadata, caption=metadata.caption or rough.caption), lyrics=answer.lyrics or rough.lyrics
        )

    async def score(self, claim: Claim) -> Likelihood:
        """Say how well words fit codes. Raises ScoringUnavailableError, and InvalidRequestError as `understand`."""
        if self._judge is None:
            raise ScoringUnavailableError(
                "the vllm engine, which runs the planner, reads prompts whole and has no room for all their logits; "
                "start the lm stage with --engine torch to score"
            )
        self._check_codes(claim.codes)
        parts = await scoring.score(claim, self._judge, self._tokenizer, max_tokens=self._max_tokens)
        return Likelihood(parts=parts, total=scoring.total(parts))

    def _check_codes(self, codes: Sequence[int]) -> None:
        unknown = set(codes).difference(self._tokenizer.code_of.values())
        if unknown:
            raise _refusal("codes", f"holds {min(unknown)}, which is no code of the loaded model")

    async def _think(self, brief: Brief) -> AsyncGenerator[Field | Metadata, None]:
        """Have the model write the metadata: every field as soon as it is settled, then what it wrote."""
        is_written = {
            "caption": brief.rewrite_caption,
            "genres": False,
            "language": brief.detect_language or brief.metadata.vocal_language is not None,
        }
        rule = ThoughtRule(keys=tuple(key for key in cot.KEYS if is_written.get(key, True)), given=brief.metadata)
        text = await self._text(brief, [metadata_prompt(brief.caption, brief.lyrics)], rule, _WORDS_PHASE)
        tokens: list[int] = []
        settled: list[Field] = []
        async with aclosing(self._writer.write(text)) as written:
            async for token in written:
                tokens.append(token)
                # A field is settled when the next one has its name.
                if b":" in self._tokenizer.words.get(token, b""):
                    for field in self._read_fields(tokens, brief)[len(settled) : -1]:
                        settled.append(field)
                        yield field
        for field in self._read_fields(tokens, brief)[len(settled) :]:
            yield field
        yield read_answer(self._tokenizer, tokens).metadata

    def _read_fields(self, tokens: Sequence[int], brief: Brief) -> list[Field]:
        found = cot.read_fields(thought_of(self._tokenizer, tokens))
        return [
            Field(name=name, value=clean(value), is_given=getattr(brief.metadata, name) is not None)
            for name, value in found.items()
        ]

    async def _write_codes(self, brief: Brief, metadata: Metadata, count: int) -> AsyncGenerator[CodeRun, None]:
        text = await self._text(brief, self._codes_prompts(brief, metadata), CodesRule(count=count), _CODES_PHASE)
        run: list[int] = []
        first = 0
        async with aclosing(self._writer.write(text)) as tokens:
            async for token in tokens:
                run.append(self._tokenizer.code_of[token])
                if len(run) == CODES_PER_RUN or first + len(run) == count:
                    yield CodeRun(first_code=first, codes=run)
                    first, run = first + len(run), []

    async def _describe(self, request: Request, prompt: Prompt, given: Metadata, *, field: str) -> Answer:
        """Have the model write a thought with all fields, then lyrics."""
        rule = ThoughtRule(keys=tuple(cot.KEYS), given=given, has_lyrics=True)
        text = await self._text(request, [prompt], rule, _WORDS_PHASE)
        room = self._max_tokens - rule.max_tokens
        if len(text.prompts[0]) > room:
            raise _refusal(field, f"is {len(text.prompts[0])} tokens with its frame; the model has room for {room}")
        async with aclosing(self._writer.write(text)) as tokens:
            return read_answer(self._tokenizer, [token async for token in tokens])

    async def _check_room(self, brief: Brief, *, is_thinking: bool) -> None:
        """Refuse words that leave no room for the longest plan that may come of them."""
        duration_s = brief.metadata.duration_s or self._max_duration_s
        rest = int(duration_s * CODE_RATE_HZ) if brief.write_codes else 0
        if is_thinking:
            rest += ThoughtRule(keys=(), given=brief.metadata).max_tokens
        prompts = await self._encode(self._codes_prompts(brief, brief.metadata))
        longest, room = max(map(len, prompts)), self._max_tokens - rest
        if longest > room:
            wanted = f"are {longest} tokens with the caption; {duration_s:g} s of music leave room for {room}"
            raise _refusal("lyrics", wanted)

    def _codes_prompts(self, brief: Brief, metadata: Metadata) -> list[Prompt]:
        prompts = [codes_prompt(brief.caption, brief.lyrics, metadata)]
        if brief.sampling.guidance_scale > 1:
            prompts.append(unguided_prompt(brief.sampling.negative_prompt))
        return prompts

    async def _text(self, request: Brief | Request, prompts: Sequence[Prompt], rule: Rule, phase: int) -> Text:
        encoded = await self._encode(prompts)
        return Text(prompts=encoded, rule=rule, sampling=request.sampling, seed=request.seed, phase=phase)

    async def _encode(self, prompts: Sequence[Prompt]) -> tuple[tuple[int, ...], ...]:
        # Long lyrics take the tokenizer tens of milliseconds, in which streams of other songs would wait.
        encoded = await asyncio.to_thread(lambda: [self._tokenizer.encode_prompt(prompt) for prompt in prompts])
        return tuple(map(tuple, encoded))


def _fill(given: Metadata, written: Metadata) -> Metadata:
    """Keep what is given, and take what is written where nothing is."""
    is_open = {field.name: getattr(given, field.name) is None for field in fields(Metadata)}
    return replace(given, **{name: getattr(written, name) for name in is_open if is_open[name]})


def _given_fields(metadata: Metadata) -> tuple[Field, ...]:
    values = cot.read_fields(cot.dump(metadata))
    return tuple(Field(name=name, value=value, is_given=True) for name, value in values.items())


def _refusal(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError([Violation(field=field, description=description)])
