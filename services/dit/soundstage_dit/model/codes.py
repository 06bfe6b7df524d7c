"""Audio codes and latents: each 5 Hz code is a point on a grid that stands for 5 frames."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepAttentionPooler, AceStepAudioTokenDetokenizer
from torch import Tensor, nn

from soundstage_runtime.score import LATENTS_PER_CODE

_CODES_AT_ONCE: Final = 512  # so that a song of any length takes no more memory than its steps will


def grid_points(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Map codes [codes] to points [codes, dimensions] in [-1, 1]; the first dimension changes fastest."""
    points: list[Tensor] = []
    for dimension, count in enumerate(levels):
        level = codes // math.prod(levels[:dimension]) % count
        points.append(level.float() * (2 / (count - 1)) - 1)
    return torch.stack(points, dim=-1)


def nearest_codes(points: Tensor, levels: Sequence[int]) -> Tensor:
    """Map points [codes, dimensions], float32, to the codes [codes] of the grid's nearest; -1 for one not finite."""
    codes = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for dimension, count in enumerate(levels):
        level = ((count - 1) * (points[:, dimension].clamp(-1, 1) + 1) / 2 + 0.5).floor()
        codes += level.long() * math.prod(levels[:dimension])
    return torch.where(points.isfinite().all(-1), codes, -1)


class CodeEncoder(nn.Module):
    """Encodes latents as audio codes, every 5 frames by themselves."""

    def __init__(self, *, levels: Sequence[int], channels: int, width: int, pooler: dict[str, Any]) -> None:
        super().__init__()
        self.audio_acoustic_proj = nn.Linear(channels, pooler["hidden_size"])
        self.attention_pooler = AceStepAttentionPooler(**pooler)
        self.project_in = nn.Linear(width, len(levels))
        self._levels = tuple(levels)

    def forward(self, latents: Tensor, silence: Tensor) -> Tensor:
        """Map latents [frames, channels] to codes [frames / 5, rounded up]; -1 for what is not finite.

        The last frames are filled up with the first of `silence` [4 or more, channels].
        """
        weight, bias = self.project_in.weight, self.project_in.bias
        filled = torch.cat([latents.to(weight.dtype), silence[: -len(latents) % LATENTS_PER_CODE]])
        patches = filled.unflatten(0, (-1, LATENTS_PER_CODE))
        pieces = patches.split(_CODES_AT_ONCE)
        pooled = torch.cat([self.attention_pooler(self.audio_acoustic_proj(piece)[None])[0] for piece in pieces])
        # In float32: in half precision, points would cross from one code to the next.
        points = F.linear(pooled.float(), weight.float(), bias.float())
        # Softly into bounds a little wider than the grid, so that its outermost points can be the nearest.
        bounds = 1 + 1 / (torch.tensor(self._levels, device=points.device) - 1)
        return nearest_codes((points / bounds).tanh() * bounds, self._levels)


class CodeDecoder(nn.Module):
    """Decodes audio codes to the latents that hint at the melody."""

    def __init__(self, *, levels: Sequence[int], width: int, detokenizer: dict[str, Any]) -> None:
        super().__init__()
        self.project_out = nn.Linear(len(levels), width)
        self.detokenizer = AceStepAudioTokenDetokenizer(**detokenizer)
        self._levels = tuple(levels)

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes [codes], whole numbers, to latents [5 x codes, channels]."""
        weight, bias = self.project_out.weight, self.project_out.bias
        # In float32, so that neighbouring points stay apart in half precision too.
        points = F.linear(grid_points(codes, self._levels), weight.float(), bias.float())
        pieces = points.to(weight.dtype).split(_CODES_AT_ONCE)
        return torch.cat([self.detokenizer(piece[None])[0] for piece in pieces])
