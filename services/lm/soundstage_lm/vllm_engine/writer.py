"""The front of the engine: a text becomes one request or two, and every token is checked before it leaves."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final
from uuid import uuid4

import grpc
import numpy as np
from vllm import SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from soundstage_lm.grammar import Grammar
from soundstage_lm.vllm_engine.ticket import Role, Ticket, to_extra_args
from soundstage_lm.writer import Text, TokenSet
from soundstage_runtime.errors import InvalidRequestError, ServiceError, Violation

_PULSE_S: Final = 1.0
_PARTNER_DEADLINE_S: Final = 30.0  # both requests of a text end in the same step


class OutOfStepError(ServiceError):
    """The engine wrote what it must not have written: the text is given up rather than sung without guidance."""

    reason = "TEXT_OUT_OF_STEP"


class EngineLostError(ServiceError):
    """vLLM's processes are gone."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "ENGINE_LOST"


class VllmWriter:
    """Writes texts with vLLM."""

    def __init__(self, engine: AsyncLLM, grammar: Grammar, *, halt: int, end: int) -> None:
        """Take a started engine; `halt` ends a text that failed, `end` may end one that did not."""
        self.engine, self._grammar = engine, grammar
        self._stops = [halt, end]
        config = engine.vllm_config
        self.max_tokens: int = config.model_config.max_model_len
        self._vocabulary: int = config.model_config.get_vocab_size()
        self._max_prompts: int = config.scheduler_config.max_num_batched_tokens
        self._page: int = config.cache_config.block_size
        self._num_pages: int = (config.cache_config.num_gpu_blocks or 0) - 1  # one is the engine's own
        self._num_live = 0

    @property
    def num_live(self) -> int:
        """How many texts hold memory in the engine."""
        return self._num_live

    def close(self) -> None:
        """End the engine's processes."""
        self.engine.shutdown()

    async def died(self) -> str:
        """Return when the engine's processes are gone, and say so."""
        while not self.engine.errored:  # noqa: ASYNC110 (vLLM tells nobody)
            await asyncio.sleep(_PULSE_S)
        return "vLLM's engine has died"

    async def write(self, text: Text) -> AsyncGenerator[int, None]:
        """Yield the tokens of a text as they are drawn; see Writer."""
        self._check_room(text)
        constraint = self._grammar.begin(text.rule)
        allowed = constraint.allowed
        if allowed is None:
            return
        self._num_live += 1
        name = uuid4().hex
        is_guided = len(text.prompts) == 2
        role: Role = "conditional" if is_guided else "alone"
        partner = asyncio.create_task(self._write_unheard(text, name)) if is_guided else None
        tokens: list[int] = []
        try:
            async with aclosing(self._request(text, name, role)) as arrivals:
                async for token in arrivals:
                    if allowed is None or not _is_in(allowed, token):
                        raise OutOfStepError(f"the engine wrote a token that is not allowed after {len(tokens)}")
                    constraint.advance(token)
                    allowed = constraint.allowed
                    tokens.append(token)
                    if allowed is None and partner is not None:
                        await asyncio.wait([partner], timeout=_PARTNER_DEADLINE_S)
                        if not partner.done() or partner.result() != tokens:
                            raise OutOfStepError("the two requests of a guided text hold different tokens")
                    yield token
            if allowed is not None:
                raise OutOfStepError(f"the engine ended a text early, after {len(tokens)} tokens")
        except EngineDeadError as error:
            raise EngineLostError("the planner's engine has died") from error
        finally:
            self._num_live -= 1
            if partner is not None:
                partner.cancel()
                await asyncio.gather(partner, return_exceptions=True)

    async def _write_unheard(self, text: Text, name: str) -> list[int]:
        """Follow the unconditional request, whose tokens are the other's."""
        try:
            async with aclosing(self._request(text, name, "unconditional")) as tokens:
                return [token async for token in tokens]
        except Exception:
            await self.engine.abort(f"{name}-conditional")  # or it would wait for its partner for ever
            raise

    async def _request(self, text: Text, name: str, role: Role) -> AsyncGenerator[int, None]:
        ticket = Ticket(text=name, role=role, rule=text.rule, sampling=text.sampling, seed=text.seed, phase=text.phase)
        params = SamplingParams(
            temperature=0.0,  # what is left to choose is one token
            max_tokens=text.rule.max_tokens,
            stop_token_ids=self._stops,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if role == "unconditional" else RequestOutputKind.DELTA,
            extra_args=to_extra_args(ticket),
        )
        prompt = TokensPrompt(prompt_token_ids=list(text.prompts[1 if role == "unconditional" else 0]))
        async with aclosing(self.engine.generate(prompt, params, f"{name}-{role}")) as outputs:
            async for output in outputs:
                for token in output.outputs[0].token_ids:
                    yield token

    def _check_room(self, text: Text) -> None:
        """Refuse what the engine could never hold: inside, it would stop everybody."""
        assert all(0 <= token < self._vocabulary for prompt in text.prompts for token in prompt)
        lengths = [len(prompt) + text.rule.max_tokens for prompt in text.prompts]
        pages = sum(-(-length // self._page) for length in lengths)
        num_prompt_tokens = sum(map(len, text.prompts))
        if max(lengths) > self.max_tokens or pages > self._num_pages or num_prompt_tokens > self._max_prompts:
            held = f"need {sum(lengths)} tokens of memory with their answer, {max(lengths)} of them in one piece"
            room = (
                f"the engine holds {self._num_pages * self._page}, {self.max_tokens} in one piece, and "
                f"{self._max_prompts} of prompts"
            )
            raise InvalidRequestError([Violation(field="lyrics", description=f"{held}; {room}")])


def _is_in(allowed: TokenSet, token: int) -> bool:
    place = int(np.searchsorted(allowed.ids, token))
    return place < len(allowed) and int(allowed.ids[place]) == token
