"""The Qwen3 decoder. Parameter names are the released checkpoints', which carry no `model.` prefix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage_lm.model.cache import KvCache, Pass, PrefillPass, StepPass


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


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        self._layer, self._head_dim = layer, config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], run: Pass) -> Tensor:
        heads = (*x.shape[:2], -1, self._head_dim)
        query = rotate(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), turn)
        key = rotate(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), turn)
        value = self.v_proj(x).view(heads).transpose(1, 2)
        mixed = run.attend(self._layer, query, key, value)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each on a normed residual."""

    def __init__(self, config: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], run: Pass) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, run)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """The decoder without a head: the embedding is the head, and the caller takes the rows of it that it needs."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def make_cache(self, rows: int) -> KvCache:
        """Make an empty cache for `rows` sequences that step together."""
        return KvCache(
            layers=self.config.num_hidden_layers,
            rows=rows,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            device=self.embed_tokens.weight.device,
            dtype=self.embed_tokens.weight.dtype,
        )

    def prefill(self, cache: KvCache, row: int, token_ids: Sequence[int]) -> Tensor:
        """Read a prompt into an empty row; returns the last token's hidden state [hidden]."""
        ids = torch.tensor([token_ids], device=self.embed_tokens.weight.device)
        return self(ids, PrefillPass(cache, row, len(token_ids)))[0]

    def step(self, cache: KvCache, token_ids: Sequence[int]) -> Tensor:
        """Read one token for every row; returns hidden states [rows, hidden]."""
        ids = torch.tensor(token_ids, device=self.embed_tokens.weight.device)[:, None]
        return self(ids, StepPass(cache))

    def forward(self, token_ids: Tensor, run: Pass) -> Tensor:
        """Run tokens [rows, tokens]; returns the normed hidden state of each row's last one [rows, hidden]."""
        x = self.embed_tokens(token_ids)
        turn = angles(run.positions, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, turn, run)
        return self.norm(x[:, -1])


def angles(positions: Tensor, config: Qwen3Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [rows, 1, tokens, head_dim] of the rotary embedding, computed in float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angle = positions[:, None, :, None].float() * config.rope_theta**-exponents
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels of x [rows, heads, tokens, head_dim], halves apart, by their position's angles."""
    cosine, sine = turn
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-high, low], dim=-1) * sine
