"""Attention over songs that lie one after another in one sequence: no padding, so nothing leaks from it."""

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundstage_device.linear import Linear
from soundstage_device.products import has_products, multiply
from soundstage_dit.model.adapter import NOTHING, Additions, project
from soundstage_dit.model.shape import StackShape

_SCORES_AT_ONCE: Final = 3 << 18  # fewer make small products, more do not stay in a CPU's cache
_TOKENS_WEIGHED: Final = 512

Rotation = tuple[Tensor, Tensor]  # cosines and signed sines, each [tokens, 1, head_dim], float32


def rotation(lengths: Sequence[int], head_dim: int, theta: float, device: torch.device) -> Rotation:
    """Make the rotary angles of sequences of these lengths; each one counts its positions from 0."""
    positions = torch.cat([torch.arange(length, device=device, dtype=torch.float32) for length in lengths])
    rates = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(positions, rates)[:, None]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn x [tokens, heads, head_dim]; the first half of a head pairs with the second."""
    cosines, sines = by
    wide = x.float()
    return torch.addcmul(wide * cosines, wide.roll(wide.shape[-1] // 2, dims=-1), sines).to(x.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attend from all queries [heads, n, head_dim] to keys and values [kv_heads, m, head_dim].

    To all of them, or, within one sequence, to those at most `window` tokens away.
    """
    if queries.device.type == "cpu":
        return attend_in_blocks(queries, keys, values, window)
    return attend_to_all(queries, keys, values) if window is None else attend_near(queries, keys, values, window)


def attend_in_blocks(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attend as `attend`, a block of queries at a time: faster than the fused kernels on a CPU."""
    kv_heads, _, head_dim = keys.shape
    by_token = queries.unflatten(0, (kv_heads, -1)).transpose(1, 2)  # [kv_heads, n, groups, head_dim]
    scaled = torch.empty(by_token.shape, dtype=queries.dtype)
    torch.mul(by_token, head_dim**-0.5, out=scaled)
    # A block of tokens is a block of rows, of the queries that share a head of keys.
    rows, keys, values = scaled.flatten(1, 2), keys.contiguous(), values.contiguous()
    seen = torch.empty_like(rows)
    if window is not None:
        _see_near(rows, keys, values, window, seen)
    else:
        _see_all(rows, keys, values, seen)
    # As rows of tokens in memory, which is what the next layer reads.
    return seen.view_as(scaled).transpose(0, 1).flatten(1, 2).transpose(0, 1)


def _see_all(rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> None:
    """Attend from rows [kv_heads, r, head_dim] to keys and values [kv_heads, m, head_dim], into `seen` like rows."""
    block = max(1, _SCORES_AT_ONCE // keys.shape[1])
    if rows.dtype is torch.float32 and has_products():
        for head, by_channel in enumerate(values.mT.contiguous()):
            for part, into in zip(rows[head].split(block), seen[head].split(block), strict=True):
                scores = multiply(part, keys[head])
                into[:] = multiply(torch.softmax(scores, dim=-1, out=scores), by_channel)
        return
    for part, into in zip(rows.split(block, dim=1), seen.split(block, dim=1), strict=True):
        scores = part @ keys.mT
        torch.bmm(torch.softmax(scores, dim=-1, out=scores), values, out=into)


def _see_near(rows: Tensor, keys: Tensor, values: Tensor, window: int, seen: Tensor) -> None:
    """Attend as `_see_all` from rows [kv_heads, n * groups, head_dim], to keys and values near their own tokens."""
    length = keys.shape[1]
    groups = rows.shape[1] // length
    # A block of `window` tokens meets itself and a window to either side.
    distance = (torch.arange(window)[:, None] - torch.arange(-window, 2 * window)).abs()
    far = torch.zeros(distance.shape, dtype=rows.dtype).masked_fill_(distance > window, -torch.inf)
    far = far.repeat_interleave(groups, dim=0)
    for start in range(0, length, window):
        first, end, last = max(0, start - window), min(start + window, length), min(start + 2 * window, length)
        block = slice(start * groups, end * groups)
        bias = far[: (end - start) * groups, first - start + window : last - start + window]
        scores = torch.baddbmm(bias, rows[:, block], keys[:, first:last].mT)
        torch.bmm(torch.softmax(scores, dim=-1, out=scores), values[:, first:last], out=seen[:, block])


def attend_to_all(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend as `attend` without a window, with the fused kernels."""
    # Heads are repeated by hand: the fused kernels of older cards do not take grouped heads.
    groups = len(queries) // len(keys)
    keys, values = (x.repeat_interleave(groups, dim=0) for x in (keys, values))
    return F.scaled_dot_product_attention(queries[None], keys[None], values[None])[0]


def attend_near(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """Attend as `attend` with a window, with the fused kernels.

    Blocks of `window` queries meet three blocks of keys, so work and memory grow with length x window.
    """
    groups, length = len(queries) // len(keys), queries.shape[1]
    blocks = -(-length // window)
    tail = blocks * window - length
    near_keys, near_values = (
        F.pad(x, (0, 0, window, tail + window)).unfold(1, 3 * window, window).permute(1, 0, 3, 2)
        for x in (keys, values)
    )  # [blocks, kv_heads, 3 * window, head_dim]
    blocked = F.pad(queries, (0, 0, 0, tail)).unflatten(1, (blocks, window)).transpose(0, 1)

    row = torch.arange(window, device=queries.device)[:, None]
    column = torch.arange(3 * window, device=queries.device)[None] - window
    key_position = column + window * torch.arange(blocks, device=queries.device)[:, None, None]
    is_seen = ((row - column).abs() <= window) & (key_position >= 0) & (key_position < length)
    seen = F.scaled_dot_product_attention(
        blocked,
        near_keys.repeat_interleave(groups, dim=1),
        near_values.repeat_interleave(groups, dim=1),
        attn_mask=is_seen[:, None],
    )
    return seen.transpose(0, 1).flatten(1, 2)[:, :length]


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.q_proj = Linear(shape.width, shape.heads * shape.head_dim)
        self.k_proj = Linear(shape.width, shape.kv_heads * shape.head_dim)
        self.v_proj = Linear(shape.width, shape.kv_heads * shape.head_dim)
        self.o_proj = Linear(shape.heads * shape.head_dim, shape.width)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.eps)
        self._head_dim = shape.head_dim

    def query(self, x: Tensor, additions: Additions = NOTHING, turn: Rotation | None = None) -> Tensor:
        """Return queries [heads, tokens, head_dim] of x [tokens, width]."""
        return self._split(project(self.q_proj, x, additions), self.q_norm, turn)

    def remember(
        self, x: Tensor, additions: Additions = NOTHING, turn: Rotation | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [kv_heads, tokens, head_dim], of x [tokens, width]."""
        keys = self._split(project(self.k_proj, x, additions), self.k_norm, turn)
        return keys, self._split(project(self.v_proj, x, additions))

    def join(self, parts: Sequence[Tensor], additions: Additions = NOTHING) -> Tensor:
        """Put what every song attended to, [heads, tokens, head_dim], back into one [tokens, width]."""
        rows = [part.transpose(0, 1).flatten(1) for part in parts]
        return project(self.o_proj, torch.cat(rows) if len(rows) > 1 else rows[0], additions)

    def _split(self, x: Tensor, norm: nn.RMSNorm | None = None, turn: Rotation | None = None) -> Tensor:
        # Kept as rows of tokens in memory.
        heads = x.unflatten(-1, (-1, self._head_dim))
        heads = heads if norm is None else norm(heads)
        return (heads if turn is None else rotate(heads, turn)).transpose(-3, -2)


class SelfAttention(Attention):
    """Attention within each song, over all of it or over a window."""

    def __init__(self, shape: StackShape, window: int | None) -> None:
        super().__init__(shape)
        self.window = window

    def forward(self, x: Tensor, lengths: Sequence[int], turn: Rotation, additions: Additions = NOTHING) -> Tensor:
        """Map x [tokens, width], songs of `lengths` one after another, to the same shape."""
        parts = (self.query(x, additions, turn), *self.remember(x, additions, turn))
        queries, keys, values = (part.split(list(lengths), dim=1) for part in parts)
        songs = zip(queries, keys, values, strict=True)
        seen = [attend(q, k, v, self.window) for q, k, v in songs]
        return self.join(seen, additions)


class CrossAttention(Attention):
    """Attention from each song to its own conditions."""

    def forward(
        self, x: Tensor, lengths: Sequence[int], memories: Sequence[Tensor], additions: Additions = NOTHING
    ) -> Tensor:
        """Map x [tokens, width]; a memory is its song's keys and values, [2, kv_heads, conditions, head_dim]."""
        songs = self.query(x, additions).split(list(lengths), dim=1)
        seen = [attend(q, memory[0], memory[1], None) for q, memory in zip(songs, memories, strict=True)]
        return self.join(seen, additions)

    def weights(
        self, x: Tensor, memory: Tensor, heads: Sequence[int], keys: slice, additions: Additions = NOTHING
    ) -> Tensor:
        """Return how much `heads` attend from x [tokens, width] of one song to `keys`, [heads, tokens, keys], float32.

        They are shares of what is given to all conditions.
        """
        queries, remembered = self.query(x, additions), memory[0]
        groups = len(queries) // len(remembered)
        columns = remembered[[head // groups for head in heads]].mT
        # Scores of all conditions are large: a block of tokens at a time.
        return torch.cat(
            [
                ((block @ columns).float() * self._head_dim**-0.5).softmax(dim=-1)[..., keys]
                for block in queries[list(heads)].split(_TOKENS_WEIGHED, dim=1)
            ],
            dim=1,
        )


class Mlp(nn.Module):
    """A SwiGLU feed-forward layer."""

    def __init__(self, shape: StackShape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.width, shape.mlp_width)
        self.up_proj = Linear(shape.width, shape.mlp_width)
        self.down_proj = Linear(shape.mlp_width, shape.width)

    def forward(self, x: Tensor, additions: Additions = NOTHING) -> Tensor:
        """Map x [tokens, width] to the same shape."""
        gate, up = project(self.gate_proj, x, additions), project(self.up_proj, x, additions)
        return project(self.down_proj, F.silu(gate, inplace=True).mul_(up), additions)
