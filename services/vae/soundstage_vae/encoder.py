"""The Oobleck encoder as it runs: its own layers, the first of them in pieces."""

import math
from typing import Final, cast

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckEncoder
from torch import Tensor, nn

from soundstage_vae.decoder import PIECE_CONTEXT
from soundstage_vae.snake import swap_snakes
from soundstage_vae.tiling import plan_tiles

# The first two blocks, where a frame is 128 channels of 1920 samples, do most of the work on most of the memory.
_HEAD_BLOCKS: Final = 2


class Encoder(nn.Module):
    """Audio [batch, 2, samples] to means and scales [batch, 128, samples // 1920]."""

    def __init__(self, encoder: OobleckEncoder) -> None:
        """Take a loaded encoder's layers."""
        super().__init__()
        head, blocks = encoder.block[:_HEAD_BLOCKS], encoder.block[_HEAD_BLOCKS:]
        self.head = nn.Sequential(encoder.conv1, *head)
        self.trunk = nn.Sequential(*blocks, encoder.snake1, encoder.conv2)
        swap_snakes(self)
        self._samples_per_step = math.prod(cast(nn.Conv1d, block.conv1).stride[0] for block in head)

    def forward(self, audio: Tensor, *, piece_steps: int | None = None) -> Tensor:
        """Encode, the head `piece_steps` at once or in one piece."""
        return self.trunk(self._hear(audio, piece_steps))

    def _hear(self, audio: Tensor, piece_steps: int | None) -> Tensor:
        rate = self._samples_per_step
        num_steps = audio.shape[-1] // rate
        heard: list[Tensor] = []
        for piece in plan_tiles(num_steps, windows=[piece_steps or num_steps], context=PIECE_CONTEXT):
            # Samples past the last whole step give none of their own, but the last ones hear them.
            stop = audio.shape[-1] if piece.window_stop == num_steps else piece.window_stop * rate
            steps: Tensor = self.head(audio[..., piece.window_start * rate : stop])
            heard.append(steps[..., piece.core.start : piece.core.stop])
        return torch.cat(heard, dim=-1)
