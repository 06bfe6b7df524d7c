"""The Oobleck decoder as it runs: its own layers, with fewer ways to memory and back."""

import copy
import math
from typing import Final, cast

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDecoder
from torch import Tensor, nn

from soundstage_vae.snake import bend, put_bend, swap_snakes
from soundstage_vae.tiling import plan_tiles

# The last two blocks, where a frame is 128 channels of 1920 samples, do most of the work on most of the memory.
_TAIL_BLOCKS: Final = 2
# Steps of 8 samples that one sample can depend on, each side: 3 + 39 samples, then strides of 2 and 4. Nor does the
# encoder's mirror image of the tail hear further.
PIECE_CONTEXT: Final = 16


class Decoder(nn.Module):
    """Latents [batch, 64, frames] to audio [batch, 2, frames * 1920]."""

    def __init__(self, decoder: OobleckDecoder) -> None:
        """Take a loaded decoder's layers."""
        super().__init__()
        blocks, tail = decoder.block[:-_TAIL_BLOCKS], decoder.block[-_TAIL_BLOCKS:]
        self.head = nn.Sequential(decoder.conv1, *blocks)
        self.tail = nn.Sequential(*tail, decoder.snake1, decoder.conv2)
        swap_snakes(self)
        self._samples_per_step = math.prod(cast(nn.ConvTranspose1d, block.conv_t1).stride[0] for block in tail)

    def forward(self, latents: Tensor, *, piece_steps: int | None = None, sink: torch.device | None = None) -> Tensor:
        """Decode, the tail `piece_steps` at once or in one piece, into memory of `sink` or where the latents are."""
        steps: Tensor = self.head(latents)
        steps = steps.to(next(self.tail.parameters()).dtype)
        num_steps, rate = steps.shape[-1], self._samples_per_step
        if sink is None and num_steps <= (piece_steps or num_steps):
            return self.tail(steps)
        audio = torch.empty(len(latents), 2, num_steps * rate, dtype=steps.dtype, device=sink or steps.device)
        for piece in plan_tiles(num_steps, windows=[piece_steps or num_steps], context=PIECE_CONTEXT):
            core = slice((piece.core_start - piece.window_start) * rate, (piece.core_stop - piece.window_start) * rate)
            decoded = self.tail(steps[..., piece.window_start : piece.window_stop])
            audio[..., piece.core_start * rate : piece.core_stop * rate] = decoded[..., core]
        return audio


def copy_to_host(decoder: Decoder) -> Decoder:
    """Copy a decoder to the host in float32, and nothing to its own device, which may be full.

    The copy's snakes are not compiled.
    """
    memo: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().to("cpu", torch.float32), requires_grad=False)
        for weight in decoder.parameters()
    }
    host = copy.deepcopy(decoder, memo)
    put_bend(host, bend)
    return host
