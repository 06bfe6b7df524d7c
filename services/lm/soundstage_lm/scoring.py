"""How well words fit codes: what the words cost the planner that hears the codes, and what they cost it without."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import grpc
import numpy as np
from numpy.typing import NDArray

from soundstage_lm import cot
from soundstage_lm.brief import Claim, Metadata
from soundstage_lm.prompts import Control, Prompt, understand_prompt, unheard_prompt
from soundstage_lm.tokenizer import PlannerTokenizer
from soundstage_runtime.errors import InvalidRequestError, ServiceError, Violation

CAPTION: Final = "caption"
LYRICS: Final = "lyrics"
_WEIGHTS: Final = {CAPTION: 0.5, LYRICS: 0.3}
_METADATA_WEIGHT: Final = 0.2
_COUNTED_RANKS: Final = 10
_WORDS: Final = (CAPTION, "genres")  # in Metadata, but words


class ScoringUnavailableError(ServiceError):
    """The planner's engine cannot score."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "SCORING_UNAVAILABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a model thinks of the tokens of a text, each after those before it."""

    log_probabilities: NDArray[np.float32]  # [tokens]
    ranks: NDArray[np.int64]  # [tokens], 1 for the likeliest of the vocabulary


class Judge(Protocol):
    """An engine that judges texts which are there already."""

    async def judge(self, prompt: Sequence[int], targets: Sequence[Sequence[int]]) -> list[Judged]:
        """Judge each of `targets`, none of them empty, as it would go on after the prompt.

        Cancelling stops the engine before the next piece that it reads.
        """
        ...


async def score(claim: Claim, judge: Judge, tokenizer: PlannerTokenizer, *, max_tokens: int) -> dict[str, float]:
    """Score the parts of a claim, 0 to 1 each, by name; raises InvalidRequestError when the model has no room."""
    parts = _parts(claim)
    heard = tokenizer.encode_prompt(understand_prompt(claim.codes))
    # Long lyrics take the tokenizer tens of milliseconds, in which streams of songs would wait.
    targets = await asyncio.to_thread(lambda: {name: tokenizer.encode_prompt(part) for name, part in parts.items()})
    longest = len(heard) + max(map(len, targets.values()))
    if longest > max_tokens:
        wanted = f"make {longest} tokens with the words; the model has room for {max_tokens}"
        raise InvalidRequestError([Violation(field="codes", description=wanted)])
    hearing = dict(zip(targets, await judge.judge(heard, list(targets.values())), strict=True))
    words = {name: target for name, target in targets.items() if name in _WEIGHTS}
    unheard = tokenizer.encode_prompt(unheard_prompt())
    guessing = dict(zip(words, await judge.judge(unheard, list(words.values())) if words else [], strict=True))
    return {
        name: score_gain(judged, guessing[name], spread=claim.spread) if name in guessing else score_ranks(judged.ranks)
        for name, judged in hearing.items()
    }


def score_gain(heard: Judged, unheard: Judged, *, spread: float) -> float:
    """Score from 0 to 1 how much likelier a text becomes by what is heard: a half when it does not change."""
    gain = float(heard.log_probabilities.mean(dtype=np.float64) - unheard.log_probabilities.mean(dtype=np.float64))
    return squash(gain / spread)


def squash(x: float) -> float:
    """Map any number to 0 to 1, as the logistic function."""
    return 0.5 * (1 + math.tanh(x / 2))  # never overflows


def score_ranks(ranks: NDArray[np.int64]) -> float:
    """Score a text by how many tokens the model would rather have written: 1 for none, nothing for ten or more."""
    return float(np.maximum(0, 1 - (ranks - 1) / _COUNTED_RANKS).mean())


def total(scores: Mapping[str, float]) -> float:
    """Weigh parts; what is not there does not count, and at least one must be there."""
    metadata = [value for name, value in scores.items() if name not in _WEIGHTS]
    weighed = [(weight, scores[name]) for name, weight in _WEIGHTS.items() if name in scores]
    if metadata:
        weighed.append((_METADATA_WEIGHT, sum(metadata) / len(metadata)))
    return sum(weight * value for weight, value in weighed) / sum(weight for weight, _ in weighed)


def _parts(claim: Claim) -> dict[str, Prompt]:
    """Write each part as the model would have written it alone, in the order of the answer."""
    parts: dict[str, Prompt] = {}
    if claim.caption:
        parts[CAPTION] = _thought(cot.line(CAPTION, claim.caption))
    if claim.lyrics:
        parts[LYRICS] = (*_thought(""), f"# Lyric\n{claim.lyrics}\n")
    return parts | {
        name: _thought(cot.line(key, value))
        for key, name in cot.KEYS.items()
        if name not in _WORDS and (value := _value(claim.metadata, name)) is not None
    }


def _thought(inside: str) -> Prompt:
    return (Control.THINK, f"\n{inside}", Control.END_THINK, "\n")


def _value(metadata: Metadata, name: str) -> str | float | None:
    return getattr(metadata, name)
