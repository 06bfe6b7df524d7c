"""The condition encoder: lyrics, timbre and text become what the diffusion transformer attends to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from soundstage_dit.model.attention import Mlp, Rotation, SelfAttention, rotation
from soundstage_dit.model.shape import ConditionShape, StackShape


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each on its normalised input."""

    def __init__(self, shape: StackShape, window: int | None) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.self_attn = SelfAttention(shape, window)
        self.post_attention_layernorm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, turn: Rotation) -> Tensor:
        """Map x [tokens, width] to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), [len(x)], turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    """A bidirectional encoder of one sequence."""

    def __init__(self, shape: StackShape, in_width: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Linear(in_width, shape.width)
        self.layers = nn.ModuleList([EncoderLayer(shape, window) for window in shape.windows])
        self.norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self._shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Map x [tokens, in_width] to [tokens, width]."""
        return self.encode(self.embed_tokens(x))

    def encode(self, x: Tensor) -> Tensor:
        """Map embedded x [tokens, width] to the same shape."""
        turn = rotation([len(x)], self._shape.head_dim, self._shape.rope_theta, x.device)
        for layer in self.layers:
            x = layer(x, turn)
        return self.norm(x)


class TimbreEncoder(Encoder):
    """Reads reference latents as one vector."""

    def __init__(self, shape: StackShape, channels: int, *, has_token: bool) -> None:
        super().__init__(shape, channels)
        self.special_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self._has_token = has_token

    def forward(self, x: Tensor) -> Tensor:
        """Map reference latents [frames, channels] to a timbre [1, width]."""
        embedded = self.embed_tokens(x)
        # The smaller models have the token in their weights but were trained to read the first frame's place.
        if self._has_token:
            embedded = torch.cat([self.special_token[0], embedded])
        return self.encode(embedded)[:1]


class ConditionEncoder(nn.Module):
    """Encodes the conditions of one song."""

    def __init__(self, shape: ConditionShape) -> None:
        super().__init__()
        self.text_projector = nn.Linear(shape.text_width, shape.lyric.width, bias=False)
        self.lyric_encoder = Encoder(shape.lyric, shape.text_width)
        self.timbre_encoder = TimbreEncoder(shape.timbre, shape.channels, has_token=shape.has_timbre_token)

    def forward(self, text: Tensor, lyrics: Tensor, references: Sequence[Tensor]) -> Tensor:
        """Return conditions [lyric tokens + references + text tokens, width], in that order.

        text and lyrics are [tokens, text_width], each reference is latents [frames, channels].
        """
        timbres = [self.timbre_encoder(reference) for reference in references]
        return torch.cat([self.lyric_encoder(lyrics), *timbres, self.text_projector(text)])
