"""Audio codes to latents: each 5 Hz code is a point on a grid that a small network draws out to 5 frames."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepAudioTokenDetokenizer
from torch import Tensor, nn


def grid_points(codes: Tensor, levels: Sequence[int]) -> Tensor:
    """Map codes [codes] to points [codes, dimensions] in [-1, 1]; the first dimension changes fastest."""
    points: list[Tensor] = []
    for dimension, count in enumerate(levels):
        level = codes // math.prod(levels[:dimension]) % count
        points.append(level.float() * (2 / (count - 1)) - 1)
    return torch.stack(points, dim=-1)


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
        return self.detokenizer(points.to(weight.dtype)[None])[0]
