"""Our place in vLLM's sampler. vLLM has two model runners with an interface each; one class serves both."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as RowProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotProcessor

from soundstage_lm.grammar import Grammar
from soundstage_lm.tokenizer import load_tokenizer
from soundstage_lm.vllm_engine.forcing import Forcing, Row
from soundstage_lm.vllm_engine.ticket import Ticket, from_extra_args

HALT: Final = "<|endoftext|>"
MAX_DURATION: Final = "soundstage_max_duration_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    ticket: Ticket
    written: Sequence[int]  # the older runner's own list, which grows


class TextProcessor(RowProcessor, SlotProcessor):
    """Forces the tokens that Forcing chooses. Rows are known by their index, or by the slot of their request."""

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        """The older runner hands over a device and whether memory is pinned, the newer one its requests' states."""
        tokenizer = load_tokenizer(Path(vllm_config.model_config.model))
        ours: Any = vllm_config.additional_config
        grammar = Grammar(tokenizer, max_duration_s=ours[MAX_DURATION])
        self._forcing = Forcing(grammar, halt=tokenizer.token_id(HALT))
        self._states: LogitsProcRequestState | None = runner[0] if len(runner) == 1 else None
        self._members: dict[int, _Member] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError where a request has no good ticket. Runs before the request reaches the engine."""
        from_extra_args(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """The older runner asks whether greedy requests may pass us by."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """The older runner tells which rows are gone, new, and moved."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._members.pop(row, None)
        for row, params, _, written in batch_update.added:
            self._add(row, params, written)
        for row, other, direction in batch_update.moved:
            moved, met = self._members.pop(row, None), self._members.pop(other, None)
            if moved is not None:
                self._members[other] = moved
            if met is not None and direction is MoveDirectionality.SWAP:
                self._members[row] = met
        self._forcing.keep({member.ticket.text for member in self._members.values()})

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """The newer runner tells which slot has a new request."""
        self._members.pop(req_idx, None)
        self._forcing.keep({member.ticket.text for member in self._members.values()})
        self._add(req_idx, sampling_params, ())
        return True

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        """Leave logits [rows, vocabulary] one token a row."""
        if self._states is None or ctx is None:
            rows = [
                Row(index=index, ticket=member.ticket, num_written=len(member.written))
                for index, member in self._members.items()
            ]
        else:
            prompts: Any = self._states.prompt_len.np
            places = zip(ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np.tolist(), strict=False)
            rows = [
                Row(index=index, ticket=self._members[slot].ticket, num_written=length - int(prompts[slot]))
                for index, (slot, length) in enumerate(places)
                if slot in self._members
            ]
        with torch.inference_mode():
            self._forcing.force(logits, rows)
        return logits

    def _add(self, key: int, params: SamplingParams, written: Sequence[int]) -> None:
        # vLLM's own warm-up batches carry no ticket.
        if params.extra_args is None:
            self._members.pop(key, None)
            return
        ticket = from_extra_args(params.extra_args)
        self._members[key] = _Member(ticket=ticket, written=written)
        self._forcing.begin(ticket, written)
