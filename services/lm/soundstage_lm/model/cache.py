"""Keys and values of many rows, in pages of one pool, and how tokens attend to them.

The pages of all rows lie side by side, so one matmul over the pool serves every row that takes a step, however unlike
their lengths are: each page is a part of one row's attention, and the parts are put together afterwards. Nothing is
copied to attend, and no row pays for another's length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn.functional as F
from torch import Tensor

from soundstage_lm.model.pages import PAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive tokens of one row, to be read in one pass; `pages` has room for them and for all before them."""

    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]

    @property
    def end(self) -> int:
        """How long the row is afterwards."""
        return self.start + len(self.tokens)


class KvCache:
    """Per layer, keys [pages, kv_heads, PAGE, head_dim] and values [pages, kv_heads, head_dim, PAGE].

    A matmul over bfloat16 reads pairs along the axis it sums over, so that axis comes last in both.
    """

    def __init__(
        self, *, layers: int, pages: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Not filled with zeros: on a CPU, memory that is never written to costs nothing.
        def pool(*page: int) -> list[Tensor]:
            return [torch.empty(pages, kv_heads, *page, device=device, dtype=dtype) for _ in range(layers)]

        self.keys, self.values = pool(PAGE, head_dim), pool(head_dim, PAGE)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy pages, one after another, each from and to."""
        for tensor in (*self.keys, *self.values):
            for source, target in moves:
                tensor[target] = tensor[source]

    def clear(self, pages: Sequence[int]) -> None:
        """Forget what was in `pages`: not even a weight of nothing makes something of a NaN."""
        if pages:
            for tensor in (*self.keys, *self.values):
                tensor[list(pages)] = 0


class Pass:
    """One forward pass over spans, those of a single token first."""

    def __init__(self, cache: KvCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.keys[0].device

        def tensor(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, device=device)

        positions = [position for span in spans for position in range(span.start, span.end)]
        self.token_ids = tensor([token for span in spans for token in span.tokens])  # [tokens]
        self.positions = tensor(positions)  # [tokens]
        self.ends = tensor([len(span.tokens) for span in spans]).cumsum(0) - 1  # the last token of each span, [spans]
        self._pages = tensor([span.pages[at // PAGE] for span in spans for at in range(span.start, span.end)])
        self._offsets = self.positions % PAGE
        num_steps = sum(1 for _ in takewhile(lambda span: len(span.tokens) == 1, spans))
        self._steps = _Steps(spans[:num_steps], device) if num_steps else None
        self._pieces = spans[num_steps:]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store key and value, and mix values for query; all are [tokens, heads, head_dim]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        # Indexed assignment writes in place; scatter_ on this view would copy the whole cache.
        keys[self._pages, :, self._offsets] = key
        values[self._pages, :, :, self._offsets] = value
        first = 0
        mixed: list[Tensor] = []
        if self._steps is not None:
            first = self._steps.num_rows
            mixed.append(self._steps.attend(query[:first], keys, values))
        for span in self._pieces:
            here = slice(first, first := first + len(span.tokens))
            mixed.append(_attend_piece(span, query[here], key[here], value[here], keys, values))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


class _Steps:
    """How rows that read one token each attend."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.num_rows = len(spans)
        self._num_pages = 1 + max(max(span.pages) for span in spans)
        longest = max(len(span.pages) for span in spans)
        owners, filled = [0] * self._num_pages, [PAGE] * self._num_pages
        for row, span in enumerate(spans):
            for index, page in enumerate(span.pages):
                owners[page], filled[page] = row, span.end - index * PAGE
        # Where a row has fewer pages than the longest, its first stands in, and weighs nothing.
        table = [[*span.pages, *span.pages[:1] * (longest - len(span.pages))] for span in spans]
        is_past = torch.arange(PAGE) < torch.tensor(filled)[:, None]
        is_there = torch.arange(longest) < torch.tensor([len(span.pages) for span in spans])[:, None]
        self._owners = torch.tensor(owners, device=device)  # [pages]
        self._table = torch.tensor(table, device=device).flatten()  # [rows * longest]
        # Added to scores, [pages, 1, 1, PAGE], and to the peaks of pages, [rows, longest, 1, 1, 1].
        self._bias = _hide(~is_past)[:, None, None].to(device)
        self._page_bias = _hide(~is_there)[:, :, None, None, None].to(device)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Mix the values of pools of pages for query [rows, heads, head_dim]."""
        # Two matmuls over groups of heads: for a single query they beat the fused kernel with its mask.
        grouped = query.view(self.num_rows, keys.shape[1], -1, query.shape[-1]).index_select(0, self._owners)
        scores = grouped @ keys[: self._num_pages].transpose(-1, -2)
        scores = torch.add(self._bias, scores, alpha=query.shape[-1] ** -0.5)  # float32
        weights = scores.softmax(-1)
        parts = weights.to(values.dtype) @ values[: self._num_pages].transpose(-1, -2)
        # A softmax over all of a row's pages: the mass of a page is one over its peak's weight.
        peaks = self._by_row(scores.amax(-1, keepdim=True)) + self._page_bias
        shares = (peaks - peaks.amax(1, keepdim=True)).exp_() / self._by_row(weights.amax(-1, keepdim=True))
        mixed = (self._by_row(parts).float() * shares).sum(1) / shares.sum(1)
        return mixed.to(query.dtype).view(query.shape)

    def _by_row(self, of_pages: Tensor) -> Tensor:  # [pages, ...] -> [rows, longest, ...]
        return of_pages.index_select(0, self._table).unflatten(0, (self.num_rows, -1))


def _hide(is_hidden: Tensor) -> Tensor:
    return torch.zeros(is_hidden.shape).masked_fill_(is_hidden, -torch.inf)


def _attend_piece(span: Span, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Mix values for several tokens of one row, each of which sees those before it."""
    mask = None
    if span.start:
        pages = list(span.pages)
        key = keys[pages].transpose(1, 2).flatten(0, 1)[: span.end]
        value = values[pages].permute(0, 3, 1, 2).flatten(0, 1)[: span.end]
        ends = torch.arange(span.start, span.end, device=query.device)[:, None]
        mask = torch.arange(span.end, device=query.device) <= ends
    mixed = F.scaled_dot_product_attention(
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1)
