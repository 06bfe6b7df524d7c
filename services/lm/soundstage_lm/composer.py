"""The planner at work: the metadata, then the codes, whatever engine writes them."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Final

from soundstage_lm import cot
from soundstage_lm.brief import Brief, CodeRun, Metadata, Plan
from soundstage_lm.prompts import Prompt, codes_prompt, metadata_prompt, unguided_prompt
from soundstage_lm.rules import CodesRule, Rule, ThoughtRule
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_lm.writer import Text, Writer
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import CODE_RATE_HZ

CODES_PER_RUN: Final = 5  # one second of music
_METADATA_PHASE, _CODES_PHASE = 0, 1
_METADATA_TOKENS: Final = 256  # more than any metadata takes


class Composer:
    """Plans songs. Songs share the writer and nothing else."""

    def __init__(
        self, writer: Writer, tokenizer: PlannerTokenizer, *, fingerprint: str, max_duration_s: int, max_tokens: int
    ) -> None:
        """Take an engine, and the tokens that it can hold of one text, prompt and answer together."""
        self._writer, self._tokenizer = writer, tokenizer
        self._max_duration_s, self._max_tokens = max_duration_s, max_tokens
        self.fingerprint = fingerprint

    async def compose(self, brief: Brief) -> AsyncGenerator[Plan | CodeRun, None]:
        """Yield the plan, then all its codes in order. Closing the generator stops the model before its next token.

        Raises InvalidRequestError when the words leave the model no room for the song.
        """
        metadata = brief.metadata
        if not metadata.is_complete:
            metadata = await self._settle(brief)
        assert metadata.duration_s is not None
        plan = Plan(metadata=metadata, code_count=int(metadata.duration_s * CODE_RATE_HZ))
        yield plan
        prompts = [codes_prompt(brief.caption, brief.lyrics, metadata)]
        if brief.sampling.guidance_scale > 1:
            prompts.append(unguided_prompt(brief.sampling.negative_prompt))
        text = self._text(brief, prompts, CodesRule(count=plan.code_count), _CODES_PHASE)
        run: list[int] = []
        first = 0
        async with aclosing(self._writer.write(text)) as tokens:
            async for token in tokens:
                run.append(self._tokenizer.code_of[token])
                if len(run) == CODES_PER_RUN or first + len(run) == plan.code_count:
                    yield CodeRun(first_code=first, codes=run)
                    first, run = first + len(run), []

    async def _settle(self, brief: Brief) -> Metadata:
        """Have the model write the metadata that the user left open."""
        keys = [key for key in cot.KEYS if key not in ("caption", "language") or getattr(brief.metadata, cot.KEYS[key])]
        rule = ThoughtRule(keys=tuple(keys), given=brief.metadata)
        text = self._text(brief, [metadata_prompt(brief.caption, brief.lyrics)], rule, _METADATA_PHASE)
        async with aclosing(self._writer.write(text)) as tokens:
            written = cot.parse(self._tokenizer.decode([token async for token in tokens]))
        open_fields = [field.name for field in fields(Metadata) if getattr(brief.metadata, field.name) is None]
        return replace(brief.metadata, **{name: getattr(written, name) for name in open_fields})

    def _text(self, brief: Brief, prompts: Sequence[Prompt], rule: Rule, phase: int) -> Text:
        encoded = tuple(tuple(self._tokenizer.encode_prompt(prompt)) for prompt in prompts)
        duration_s = brief.metadata.duration_s or self._max_duration_s
        room = self._max_tokens - int(duration_s * CODE_RATE_HZ) - _METADATA_TOKENS
        longest = max(map(len, encoded))
        if longest > room:
            wanted = f"are {longest} tokens with the caption; {duration_s:g} s of music leave room for {room}"
            raise InvalidRequestError([Violation(field="lyrics", description=wanted)])
        return Text(prompts=encoded, rule=rule, sampling=brief.sampling, seed=brief.seed, phase=phase)
