"""What a song's words and timbre become for the transformer. One song at a time, so none changes another."""

from dataclasses import dataclass
from itertools import takewhile
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Model

from soundstage_dit.alignment import find_lines
from soundstage_dit.model.condition import ConditionEncoder
from soundstage_dit.prompts import END_OF_TEXT, lyric_head, lyric_prompt, text_prompt
from soundstage_dit.song import Song
from soundstage_runtime.score import REFERENCE_LATENTS

MAX_TEXT_TOKENS = 256
MAX_LYRIC_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class LyricTokens:
    """The lyrics' own tokens: where among the conditions they are, each one's text, and lines, by these tokens."""

    places: slice
    texts: tuple[str, ...]
    lines: tuple[tuple[str, slice], ...]


class Conditioner:
    """Owns the encoders; `silence` is the latents of silence, [15000, channels], `for_stems` the kind of prompts."""

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: Qwen3Model,
        condition_encoder: ConditionEncoder,
        silence: Tensor,
        for_stems: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder
        self._condition_encoder = condition_encoder
        self._silence = silence
        self._for_stems = for_stems

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The encoders."""
        return (self._text_encoder, self._condition_encoder)

    def encode(self, song: Song) -> Tensor:
        """Return what the song's cross-attention sees, [conditions, width]; the timbre of silence for no reference."""
        text = self._tokenize(text_prompt(song, for_stems=self._for_stems), MAX_TEXT_TOKENS)
        lyrics = self._tokenize(lyric_prompt(song), MAX_LYRIC_TOKENS)
        references = [torch.from_numpy(reference).to(self._silence) for reference in song.references]
        return self._condition_encoder(
            self._text_encoder(inputs_embeds=self._embed(text)[None]).last_hidden_state[0],
            self._embed(lyrics),  # the lyric encoder wants words without context
            references or [self._silence[:REFERENCE_LATENTS]],
        )

    def lyric_tokens(self, song: Song) -> LyricTokens:
        """Return the tokens of the lyrics, as far as the model reads them; empty lines are left out."""
        tokens: list[int] = self._tokenize(lyric_prompt(song), MAX_LYRIC_TOKENS).tolist()
        first = len(self._tokenizer(lyric_head(song), add_special_tokens=False)["input_ids"])
        end_of_text = self._tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        words = list(takewhile(lambda token: token != end_of_text, tokens[first:]))
        texts = tuple(map(self._decode, ([token] for token in words)))
        # Together, because a letter may be of several tokens.
        lines = [(self._decode(words[span]).strip(), span) for span in find_lines(texts)]
        return LyricTokens(
            places=slice(first, first + len(words)),
            texts=texts,
            lines=tuple((text, span) for text, span in lines if text),
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        """Look tokens [tokens] up where the table is, which may be elsewhere than the networks."""
        table = cast(nn.Embedding, self._text_encoder.get_input_embeddings())
        return table(tokens.to(table.weight.device)).to(self._silence.device)

    def _decode(self, tokens: list[int]) -> str:
        return cast(str, self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _tokenize(self, text: str, limit: int) -> Tensor:
        tokens = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        return torch.tensor(tokens)
