"""The PyTorch engine: texts share the model and nothing else, and take turns token by token."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from soundstage_lm.grammar import Grammar
from soundstage_lm.sampling import draw, guide, penalize, uniform
from soundstage_lm.weights import Checkpoint
from soundstage_lm.writer import Text, TokenSet
from soundstage_runtime.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")


class TorchWriter:
    """Writes texts with a network of its own process."""

    def __init__(self, checkpoint: Checkpoint, worker: Worker, grammar: Grammar) -> None:
        self._model, self._worker, self._grammar = checkpoint.model, worker, grammar
        self._num_live = 0

    @property
    def num_live(self) -> int:
        """How many texts hold memory in the engine."""
        return self._num_live

    async def write(self, text: Text) -> AsyncGenerator[int, None]:
        """Yield the tokens of a text as they are drawn; see Writer."""
        self._num_live += 1
        try:
            constraint = self._grammar.begin(text.rule)
            cache = self._model.make_cache(len(text.prompts))
            hidden: list[Tensor] = []  # of each row's last token, [hidden]
            for row, prompt in enumerate(text.prompts):
                hidden.append(await self._run(self._model.prefill, cache, row, prompt))
            tokens: list[int] = []
            while allowed := constraint.allowed:
                if tokens:
                    pending = [tokens[-1]] * len(hidden)
                    hidden = list(await self._run(self._model.step, cache, pending))
                token = int(allowed.ids[0])
                if len(allowed) > 1:
                    token = await self._run(self._choose, hidden, allowed, text, tokens)
                constraint.advance(token)
                tokens.append(token)
                yield token
        finally:
            self._num_live -= 1

    def _choose(self, hidden: list[Tensor], allowed: TokenSet, text: Text, tokens: list[int]) -> int:
        ids = torch.from_numpy(allowed.ids).to(hidden[0].device)
        logits = (torch.stack(hidden) @ self._model.embed_tokens.weight[ids].T).float()
        chosen = guide(logits[0], logits[1], text.sampling.guidance_scale) if len(hidden) > 1 else logits[0]
        if text.sampling.repetition_penalty != 1:
            is_written = torch.from_numpy(np.isin(allowed.ids, tokens)).to(chosen.device)
            chosen = penalize(chosen, is_written, text.sampling.repetition_penalty)
        sampling = replace(text.sampling, temperature=0) if allowed.is_greedy else text.sampling
        return int(allowed.ids[draw(chosen, sampling, uniform(text.seed, text.phase, len(tokens)))])

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._worker.run(torch.inference_mode()(work), *args, **kwargs)
