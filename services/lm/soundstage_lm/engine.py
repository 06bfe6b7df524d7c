"""The planner at work: the metadata, then the codes, one token a step."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_device.device import choose_device, choose_dtype, dtype_name
from soundstage_lm import cot
from soundstage_lm.brief import Brief, CodeRun, Metadata, Plan
from soundstage_lm.grammar import Grammar, Writing
from soundstage_lm.prompts import Prompt, codes_prompt, metadata_prompt, unguided_prompt
from soundstage_lm.sequence import Candidates, GuidedSequence
from soundstage_lm.settings import LmSettings
from soundstage_lm.weights import Checkpoint, load_checkpoint
from soundstage_runtime.checkpoint import locate
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import CODE_RATE_HZ
from soundstage_runtime.worker import Worker

_log = structlog.get_logger()

CODES_PER_RUN: Final = 5  # one second of music
_METADATA_PHASE, _CODES_PHASE = 0, 1
_METADATA_TOKENS: Final = 256  # more than any metadata takes

P = ParamSpec("P")
T = TypeVar("T")


class Composer:
    """Plans songs. Songs share the model and nothing else, and take turns token by token."""

    def __init__(self, checkpoint: Checkpoint, worker: Worker, *, max_duration_s: int) -> None:
        self._model, self._tokenizer, self._worker = checkpoint.model, checkpoint.tokenizer, worker
        self._max_duration_s = max_duration_s
        self._grammar = Grammar(checkpoint.tokenizer, max_duration_s=max_duration_s)
        embedding = checkpoint.model.embed_tokens.weight
        ids = checkpoint.tokenizer.code_ids
        self._codes = Candidates(ids=ids, head=_rows(embedding, ids))
        self.fingerprint = checkpoint.fingerprint
        self.variant = checkpoint.variant
        self.device, self.dtype = str(embedding.device), dtype_name(embedding.dtype)
        self.num_live = 0

    async def compose(self, brief: Brief) -> AsyncGenerator[Plan | CodeRun, None]:
        """Yield the plan, then all its codes in order. Closing the generator stops the model before its next token.

        Raises InvalidRequestError when the words leave the model no room for the song.
        """
        self.num_live += 1
        try:
            metadata = brief.metadata
            if not metadata.is_complete:
                metadata = await self._settle(brief)
            assert metadata.duration_s is not None
            plan = Plan(metadata=metadata, code_count=int(metadata.duration_s * CODE_RATE_HZ))
            yield plan
            prompts = [codes_prompt(brief.caption, brief.lyrics, metadata)]
            if brief.sampling.guidance_scale > 1:
                prompts.append(unguided_prompt(brief.sampling.negative_prompt))
            sequence = await self._open(brief, prompts, _CODES_PHASE)
            for first in range(0, plan.code_count, CODES_PER_RUN):
                count = min(CODES_PER_RUN, plan.code_count - first)
                # The end of turn is no candidate: a plan is exactly as long as its duration.
                indices = [await self._run(sequence.write, self._codes) for _ in range(count)]
                yield CodeRun(first_code=first, codes=self._tokenizer.codes[indices].tolist())
        finally:
            self.num_live -= 1

    async def _settle(self, brief: Brief) -> Metadata:
        """Have the model write the metadata that the user left open."""
        sequence = await self._open(brief, [metadata_prompt(brief.caption, brief.lyrics)], _METADATA_PHASE)
        writing = self._grammar.begin(brief.metadata)
        while len(writing.allowed):
            await self._run(self._write_metadata, sequence, writing)
        written = cot.parse(self._tokenizer.decode(sequence.tokens))
        open_fields = [field.name for field in fields(Metadata) if getattr(brief.metadata, field.name) is None]
        return replace(brief.metadata, **{name: getattr(written, name) for name in open_fields})

    def _write_metadata(self, sequence: GuidedSequence, writing: Writing) -> None:
        ids = writing.allowed
        index = sequence.write(Candidates(ids=ids, head=_rows(self._model.embed_tokens.weight, ids)))
        writing.advance(int(ids[index]))

    async def _open(self, brief: Brief, prompts: Sequence[Prompt], phase: int) -> GuidedSequence:
        """Read the prompts, one a step, into a sequence of their own."""
        encoded = await self._run(lambda: [self._tokenizer.encode_prompt(prompt) for prompt in prompts])
        duration_s = brief.metadata.duration_s or self._max_duration_s
        room = self._model.config.max_position_embeddings - int(duration_s * CODE_RATE_HZ) - _METADATA_TOKENS
        longest = max(map(len, encoded))
        if longest > room:
            wanted = f"are {longest} tokens with the caption; {duration_s:g} s of music leave room for {room}"
            raise InvalidRequestError([Violation(field="lyrics", description=wanted)])
        sequence = GuidedSequence(self._model, rows=len(encoded), sampling=brief.sampling, seed=brief.seed, phase=phase)
        for prompt in encoded:
            await self._run(sequence.read, prompt)
        return sequence

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._worker.run(torch.inference_mode()(work), *args, **kwargs)


def load_composer(settings: LmSettings, worker: Worker) -> Composer:
    """Load the planner that the settings name. Raises CheckpointError."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    if dtype is torch.float16:
        _log.warning("float32_instead_of_float16", why="the released planners overflow float16 in their second layer")
        dtype = torch.float32
    checkpoint = load_checkpoint(locate(settings.model), device=device, dtype=dtype)
    return Composer(checkpoint, worker, max_duration_s=settings.max_duration_s)


def describe(composer: Composer, settings: LmSettings) -> StageModel:
    """What StageService says of a loaded planner."""
    return StageModel(
        name=Path(settings.model).name,
        variant=composer.variant,
        model_fingerprint=composer.fingerprint,
        dtype=composer.dtype,
    )


def _rows(embedding: Tensor, ids: NDArray[np.int64]) -> Tensor:
    """Take rows of the tied head: a view where they lie together, else a copy."""
    first = int(ids[0])
    if np.array_equal(ids, np.arange(first, first + len(ids))):
        return embedding[first : first + len(ids)]
    return embedding[torch.from_numpy(ids).to(embedding.device)]
