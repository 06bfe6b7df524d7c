"""transformers' generate with its own guidance: the same song, token by token, two forward passes for each."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

_INSTRUCTION = "Generate audio semantic tokens based on the given conditions:"
_KNOWN = "bpm: 90\nduration: 30\nkeyscale: G major\ntimesignature: 4"


class _Clock(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """A planner's checkpoint in transformers."""

    def __init__(self, folder: Path, *, device: str, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        logging.disable_progress_bar()
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        # Typed for a class of theirs that no model of theirs is.
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        for parameter in self._model.parameters():
            parameter.data = parameter.data.clone()  # else they stay in the mapped file, and may be paged out
        self._model.to(device)

    def write(self, caption: str, lyrics: str, num_tokens: int) -> list[float]:
        """Write so many tokens; returns when each came.

        They are drawn as a planner draws them, from all of the vocabulary.
        """
        conditional = self._encode(f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n", _KNOWN)
        clock = _Clock()
        self._model.generate(
            conditional,
            attention_mask=torch.ones_like(conditional),
            negative_prompt_ids=self._encode("NO USER INPUT", ""),
            guidance_scale=2.0,
            do_sample=True,
            temperature=0.85,
            top_p=0.9,
            top_k=0,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            streamer=clock,
        )
        return clock.times[1:]  # the first is the prompt's

    def _encode(self, user: str, known: str) -> torch.Tensor:
        text = (
            f"<|im_start|>system\n# Instruction\n{_INSTRUCTION}\n\n<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            f"<|im_start|>assistant\n<think>\n{known}\n</think>\n\n"
        )
        return torch.tensor([self._tokenizer.encode(text)], device=self._model.device)
