"""When words are sung: from where heads of the transformer attend to a path through the song. Arrays only.

The method and its constants are the reference's, but for the path's sums, which are float64 here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final

import grpc
import numpy as np
from numpy.typing import NDArray

from soundstage_runtime.errors import ServiceError

Matrix = NDArray[np.float32]  # [tokens, frames]; a frame is one of the transformer's here, 0.08 s
Path = tuple[NDArray[np.int64], NDArray[np.int64]]  # tokens and frames of each step, both rising
Heads = Mapping[int, tuple[int, ...]]  # by layer

# Which heads follow the singing, by layers and heads of the transformer. They were found by listening, once a model.
_HEADS: Final[Mapping[tuple[int, int], Heads]] = MappingProxyType(
    {(24, 16): {2: (6,), 3: (10, 11), 4: (3,), 5: (8, 9), 6: (8,)}}
)
_SUPPRESSION: Final = 2.0  # times the median
_NO_VARIANCE: Final = 1e-9
_COVERED: Final = 0.1
_AUDIBLE: Final = 0.01
_OVERLAP_FRAMES: Final = 9.0

_ACROSS, _DOWN, _ALONG = 0, 1, 2  # to the next token and frame, the next token, the next frame


class UncalibratedError(ServiceError):
    """Nobody knows which heads of the loaded model follow the singing."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_NOT_CALIBRATED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of lyrics and when it is sung."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """When the lines are sung; how well the song follows them, and how well what it was made of does, 0 to 1 each."""

    lines: tuple[Line, ...] = ()
    score: float = 0.0
    plan_score: float = 0.0


def find_heads(layers: int, heads: int, own: Heads | None = None) -> Heads:
    """Return the heads that follow the singing: a checkpoint's `own`, or those of models of so many layers and heads.

    Raises UncalibratedError.
    """
    found = own or _HEADS.get((layers, heads))
    if found is None:
        raise UncalibratedError(
            f"the loaded model has {layers} layers of {heads} heads, and it is not known which of them follow the "
            "singing; a model of 24 layers of 16 heads, as the 2B ones are, can align its songs, and so can one whose "
            "config.json has lyric_alignment_heads"
        )
    return found


def sharpen(attention: Matrix) -> Matrix:
    """Keep where a token and a frame single each other out, and suppress those that attend everywhere."""
    kept = _softmax(attention, axis=1) * _softmax(attention, axis=0)
    for axis in (1, 0):
        kept = np.maximum(kept - _SUPPRESSION * np.median(kept, axis=axis, keepdims=True), 0)
    return kept**2


def combine(sharpened: Sequence[Matrix]) -> Matrix:
    """Bring what heads kept to one scale, and take their mean."""
    mean = float(np.mean([head.mean(dtype=np.float64) for head in sharpened]))
    variance = float(np.mean([np.square(head - mean).mean(dtype=np.float64) for head in sharpened]))
    return (_mean(sharpened) - mean) / (variance**0.5 + _NO_VARIANCE)


def warp(cost: Matrix) -> Path:
    """Find the cheapest path from the first token and frame to the last, a step at a time.

    A step to both is taken only where it is cheaper than either, and so is one to a token: ties go along the frames.
    """
    tokens, frames = cost.shape
    mirrored = cost[:, ::-1].astype(np.float64)
    moves = np.empty((tokens + frames - 1, tokens), np.int8)  # by token + frame, and token
    # Sums of the cells before, by their token + 1: all cells of a diagonal follow from the two diagonals before it.
    earlier, last = np.full(tokens + 1, np.inf), np.full(tokens + 1, np.inf)
    earlier[0] = 0
    for diagonal in range(len(moves)):
        first, end = max(0, diagonal - frames + 1), min(tokens, diagonal + 1)
        across, down, along = earlier[first:end], last[first:end], last[first + 1 : end + 1]
        is_across, is_down = (across < down) & (across < along), (down < across) & (down < along)
        moves[diagonal, first:end] = np.where(is_across, _ACROSS, np.where(is_down, _DOWN, _ALONG))
        here = np.full(tokens + 1, np.inf)
        here[first + 1 : end + 1] = np.where(is_across, across, np.where(is_down, down, along))
        here[first + 1 : end + 1] += mirrored.diagonal(frames - 1 - diagonal)
        earlier, last = last, here
    token, frame = tokens - 1, frames - 1
    path = [(token, frame)]
    while token or frame:
        move = moves[token + frame, token]
        token, frame = token - (move != _ALONG), frame - (move != _DOWN)
        path.append((token, frame))
    rows, columns = np.array(path[::-1]).T
    return rows, columns


def time_lines(lines: Sequence[tuple[str, slice]], path: Path, frame_s: float) -> tuple[Line, ...]:
    """Tell when lines are sung: from where their first token begins to where their last one ends."""
    rows, columns = path
    tokens = np.arange(rows[-1] + 1)
    starts = columns[np.searchsorted(rows, tokens)]
    ends = columns[np.searchsorted(rows, tokens, side="right") - 1]
    return tuple(
        Line(
            text=text,
            start_s=round(float(starts[span.start]) * frame_s, 3),
            end_s=round(float(ends[span.stop - 1]) * frame_s, 3),
        )
        for text, span in lines
    )


def score_attention(heads: Sequence[Matrix], is_sung: NDArray[np.bool_]) -> float:
    """Score the attention of heads from 0 to 1; only tokens that are sung must be covered, and in order."""
    attention = _mean(heads)
    low, high = float(attention.min()), float(attention.max())
    energy = (attention - low) / (high - low) if high - low > _NO_VARIANCE else np.zeros_like(attention)
    rows, columns = warp(-(energy**2))
    confidence = float(energy[rows, columns].mean(dtype=np.float64))
    sung = energy[is_sung].astype(np.float64)
    if not len(sung):
        return round(confidence, 4)
    coverage = float((sung.max(axis=1) > _COVERED).mean())
    weights = np.where(sung > _AUDIBLE, sung, 0)
    weights = weights[weights.sum(axis=1) > _NO_VARIANCE]
    centres = weights @ np.arange(energy.shape[1]) / weights.sum(axis=1)
    order = float((np.diff(centres) >= -_OVERLAP_FRAMES).mean()) if len(centres) > 1 else 1.0
    return round(coverage**2 * order**2 * confidence, 4)


def find_lines(tokens: Sequence[str]) -> list[slice]:
    """Part the tokens of lyrics into lines; a token with a line's end in it is the line's last."""
    ends = [index + 1 for index, token in enumerate(tokens) if "\n" in token]
    return [slice(start, end) for start, end in pairwise([0, *ends, len(tokens)]) if start < end]


def find_sung(tokens: Sequence[str]) -> NDArray[np.bool_]:
    """Tell which tokens of lyrics are sung: all but those of tags, such as [verse]."""
    is_sung: list[bool] = []
    is_tag = False
    for token in tokens:
        is_tag = is_tag or "[" in token
        is_sung.append(not is_tag and "]" not in token)
        is_tag = is_tag and "]" not in token
    return np.array(is_sung, dtype=np.bool_)


def _mean(heads: Sequence[Matrix]) -> Matrix:
    """Return the mean of matrices, which are large: never all of them once more."""
    total = heads[0].copy()
    for head in heads[1:]:
        total += head
    total /= len(heads)
    return total


def _softmax(x: Matrix, *, axis: int) -> Matrix:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)
