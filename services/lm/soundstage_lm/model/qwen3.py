"""The Qwen3 decoder. Parameter names are the released checkpoints', which carry no `model.` prefix.

But for two things, done when weights are loaded: what has the same input is one (weights.py, `fuse`), and what
goes into an MLP's last projection is divided by LIFT. What comes out is multiplied back in float32, and the residual
stream is float32: the released planners write values near 2e6 there, which float16 cannot hold. LIFT is a power of two,
so in the other types nothing changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage_device.linear import Linear
from soundstage_lm.model.cache import KvCache, Pass, Span
from soundstage_lm.model.pages import PAGE

LIFT: Final = 128.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config:
    """The dimensions of a Qwen3 decoder, named as in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float


class Norm(nn.Module):
    """Root-mean-square norm of the last axis, computed in float32, into the weights' type."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self._eps).to(self.weight.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        self._layer, self._head_dim = layer, config.head_dim
        self._heads = [config.num_attention_heads, config.num_key_value_heads]
        self.qkv_proj = Linear(config.hidden_size, (sum(self._heads) + self._heads[1]) * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)
        self.qk_norm = Norm(sum(self._heads), config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], run: Pass) -> Tensor:
        query_key, value = (
            self.qkv_proj(x).view(len(x), -1, self._head_dim).split([sum(self._heads), self._heads[1]], 1)
        )
        query, key = rotate(self.qk_norm(query_key), turn).split(self._heads, 1)
        mixed = run.attend(self._layer, query, key, value)
        return self.o_proj(mixed.flatten(1))


class Mlp(nn.Module):
    """SwiGLU; what it returns is to be lifted."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and MLP, each on a normed residual."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], run: Pass) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, run)
        return x.add(self.mlp(self.post_attention_layernorm(x)), alpha=LIFT)  # in float32


class Qwen3(nn.Module):
    """The decoder without a head: the embedding is the head, and the caller takes the rows of it that it needs."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def page_bytes(self) -> int:
        """What a page of the cache takes."""
        config = self.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * PAGE
        return numbers * self.embed_tokens.weight.itemsize

    def make_cache(self, pages: int) -> KvCache:
        """Make an empty cache of `pages`."""
        return KvCache(
            layers=self.config.num_hidden_layers,
            pages=pages,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            device=self.embed_tokens.weight.device,
            dtype=self.embed_tokens.weight.dtype,
        )

    def read(self, cache: KvCache, spans: Sequence[Span]) -> Tensor:
        """Read spans, those of a single token first; returns each one's last normed hidden state [spans, hidden]."""
        run = Pass(cache, spans)
        return self.norm(self._run(run)[run.ends])

    def read_all(self, cache: KvCache, span: Span) -> Tensor:
        """Read a span; returns the normed hidden states of all its tokens [tokens, hidden]."""
        return self.norm(self._run(Pass(cache, [span])))

    def _run(self, run: Pass) -> Tensor:
        x = self.embed_tokens(run.token_ids).float()
        turn = angles(run.positions, self.config, self.embed_tokens.weight.dtype)
        for layer in self.layers:
            x = layer(x, turn, run)
        return x


def angles(positions: Tensor, config: Qwen3Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine [tokens, 1, head_dim] of the rotary embedding, computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angle = positions[:, None, None].float() * config.rope_theta**-exponents
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([cosine, cosine], dim=-1).to(dtype), torch.cat([-sine, sine], dim=-1).to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels of x [tokens, heads, head_dim], halves apart, by their position's angles."""
    cosine, sine = turn
    return x * cosine + x.roll(x.shape[-1] // 2, dims=-1) * sine
