"""Keys and values of rows that are decoded together, each with its own length."""

from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BUCKET: Final = 128


class KvCache:
    """Per layer, keys and values [rows, kv_heads, capacity, head_dim].

    Capacity is always whole buckets and always passed whole: a slice of a larger cache is not contiguous, and every
    matmul would copy it.
    """

    def __init__(
        self, *, layers: int, rows: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        def empty() -> list[Tensor]:
            return [torch.zeros(rows, kv_heads, 0, head_dim, device=device, dtype=dtype) for _ in range(layers)]

        self.lengths = [0] * rows
        self.keys, self.values = empty(), empty()

    @property
    def capacity(self) -> int:
        """Tokens that every row has room for."""
        return self.keys[0].shape[2]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in every row, copying what is there when another bucket is needed."""
        missing = -(-tokens // BUCKET) * BUCKET - self.capacity
        if missing > 0:
            # One layer at a time: there are never two whole caches.
            for tensors in (self.keys, self.values):
                for layer, tensor in enumerate(tensors):
                    tensors[layer] = F.pad(tensor, (0, 0, 0, missing))


class Pass(Protocol):
    """A forward pass over a cache: which positions its tokens have, and how they attend."""

    positions: Tensor  # [rows, tokens]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store key and value, and mix values for query; all are [rows, heads, tokens, head_dim]."""
        ...


class PrefillPass:
    """A whole prompt into one empty row."""

    def __init__(self, cache: KvCache, row: int, tokens: int) -> None:
        cache.reserve(tokens)
        cache.lengths[row] = tokens
        self._cache, self._row, self._tokens = cache, row, tokens
        self.positions = torch.arange(tokens, device=cache.keys[0].device)[None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See Pass."""
        self._cache.keys[layer][self._row, :, : self._tokens] = key[0]
        self._cache.values[layer][self._row, :, : self._tokens] = value[0]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class StepPass:
    """One more token for every row."""

    def __init__(self, cache: KvCache) -> None:
        cache.reserve(max(cache.lengths) + 1)
        device = cache.keys[0].device
        self._cache = cache
        self._rows = torch.arange(len(cache.lengths), device=device)
        self._ends = torch.tensor(cache.lengths, device=device)
        self.positions = self._ends[:, None]
        is_past = torch.arange(cache.capacity, device=device) <= self.positions
        self._mask = torch.zeros(is_past.shape, device=device).masked_fill(~is_past, float("-inf"))[:, None, None]
        cache.lengths = [length + 1 for length in cache.lengths]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See Pass."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        # Indexed assignment writes in place; scatter_ on this view would copy the whole cache.
        keys[self._rows, :, self._ends] = key[:, :, 0]
        values[self._rows, :, self._ends] = value[:, :, 0]
        # Two matmuls over groups of heads: for a single query they beat the fused kernel with its mask.
        grouped = query.reshape(len(self._rows), keys.shape[1], -1, query.shape[-1])
        scores = (grouped @ keys.transpose(-1, -2)).float() * query.shape[-1] ** -0.5 + self._mask
        return (scores.softmax(-1).to(values.dtype) @ values).reshape(query.shape)
