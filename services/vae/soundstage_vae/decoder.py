"""The Oobleck decoder as it runs: its own layers, with fewer ways to memory and back."""

import copy
from typing import Final

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDecoder
from torch import Tensor, nn

from soundstage_runtime.score import SAMPLES_PER_LATENT
from soundstage_vae.snake import bend, put_bend, swap_snakes
from soundstage_vae.tiling import plan_tiles

# Three parts: a latent frame has 10 steps where the second begins, and 240 where the third does. That is the last two
# blocks, where a frame is 128 channels of 1920 samples, and does most of the work on most of the memory.
_FIRST_BLOCKS: Final = 1
_TAIL_BLOCKS: Final = 2
_STEPS: Final = (10, 240)
_SAMPLES_PER_STEP: Final = SAMPLES_PER_LATENT // _STEPS[1]  # of the tail
# Steps that one sample can depend on, each side: of the tail 3 + 39 samples, then strides of 2 and 4. Nor does the
# encoder's mirror image of the tail hear further.
PIECE_CONTEXT: Final = 16
MIDDLE_CONTEXT: Final = 10  # steps of the middle part that any of those can depend on


class Decoder(nn.Module):
    """Latents [batch, 64, frames] to audio [batch, 2, frames * 1920]."""

    def __init__(self, decoder: OobleckDecoder) -> None:
        """Take a loaded decoder's layers."""
        super().__init__()
        blocks = decoder.block
        self.head = nn.Sequential(decoder.conv1, *blocks[:_FIRST_BLOCKS])
        self.middle = nn.Sequential(*blocks[_FIRST_BLOCKS:-_TAIL_BLOCKS])
        self.tail = nn.Sequential(*blocks[-_TAIL_BLOCKS:], decoder.snake1, decoder.conv2)
        swap_snakes(self)

    def forward(
        self,
        latents: Tensor,
        *,
        core: range | None = None,
        piece_steps: int | None = None,
        sink: torch.device | None = None,
    ) -> Tensor:
        """Decode the frames `core` of a window, or all of it, into memory of `sink` or where the latents are.

        What the others are for is lost from part to part. The tail does `piece_steps` at once, or all in one piece.
        """
        core = core or range(latents.shape[-1])
        steps, first = _near(self.head(latents), core, _STEPS[0], MIDDLE_CONTEXT, first=0)
        more = _STEPS[1] // _STEPS[0]
        steps, first = _near(self.middle(steps), core, _STEPS[1], PIECE_CONTEXT, first=first * more)
        audio = self._sound(steps.to(next(self.tail.parameters()).dtype), piece_steps, sink)
        start = core.start * SAMPLES_PER_LATENT - first * _SAMPLES_PER_STEP
        return audio[..., start : start + len(core) * SAMPLES_PER_LATENT]

    def _sound(self, steps: Tensor, piece_steps: int | None, sink: torch.device | None) -> Tensor:
        num_steps, rate = steps.shape[-1], _SAMPLES_PER_STEP
        if sink is None and num_steps <= (piece_steps or num_steps):
            return self.tail(steps)
        audio = torch.empty(len(steps), 2, num_steps * rate, dtype=steps.dtype, device=sink or steps.device)
        for piece in plan_tiles(num_steps, windows=[piece_steps or num_steps], context=PIECE_CONTEXT):
            decoded = self.tail(steps[..., piece.window_start : piece.window_stop])
            core = decoded[..., piece.core.start * rate : piece.core.stop * rate]
            audio[..., piece.core_start * rate : piece.core_stop * rate] = core
        return audio


def _near(x: Tensor, core: range, rate: int, context: int, *, first: int) -> tuple[Tensor, int]:
    """Leave the steps of x that are at most `context` from those of the core, and say where they begin.

    x begins at the step `first` of its window, which has `rate` of them a frame.
    """
    begin = max(first, core.start * rate - context)
    return x[..., begin - first : core.stop * rate + context - first], begin


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
