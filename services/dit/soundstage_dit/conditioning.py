"""Conditions of one song: its words, codes and silence as tensors. One at a time, so no song changes another."""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Model

from soundstage_dit.model.codes import CodeDecoder
from soundstage_dit.model.condition import ConditionEncoder
from soundstage_dit.prompts import lyric_prompt, text_prompt
from soundstage_dit.song import Song

MAX_TEXT_TOKENS = 256
MAX_LYRIC_TOKENS = 2048
REFERENCE_FRAMES = 750  # 30 s


class Conditioner:
    """Owns the encoders; `silence` is the latents of silence, [15000, channels]."""

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: Qwen3Model,
        condition_encoder: ConditionEncoder,
        code_decoder: CodeDecoder,
        silence: Tensor,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._condition_encoder = condition_encoder
        self._code_decoder = code_decoder
        self._silence = silence

    def encode(self, song: Song) -> Tensor:
        """Return what the song's cross-attention sees, [conditions, width]."""
        text = self._tokenize(text_prompt(song), MAX_TEXT_TOKENS)
        lyrics = self._tokenize(lyric_prompt(song), MAX_LYRIC_TOKENS)
        return self._condition_encoder(
            self._text_encoder(input_ids=text[None]).last_hidden_state[0],
            self._text_encoder.get_input_embeddings()(lyrics),  # the lyric encoder wants words without context
            self._silence[:REFERENCE_FRAMES],
        )

    def context(self, song: Song) -> Tensor:
        """Return the source the song is made over, and a mask of ones: [frames, 2 x channels]."""
        source = self._silence[: song.num_frames]
        if song.codes:
            hints = self._code_decoder(torch.tensor(song.codes, device=source.device))[: song.num_frames]
            source = torch.cat([hints, source[: song.num_frames - len(hints)]])
        return torch.cat([source, torch.ones_like(source)], dim=-1)

    def _tokenize(self, text: str, limit: int) -> Tensor:
        tokens = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        return torch.tensor(tokens, device=self._silence.device)
