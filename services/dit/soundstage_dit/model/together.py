"""A layer's way on a GPU: all songs in one sequence, by one compiled function for any number of songs of any length.

The ways in `dit.py` take songs one by one where they must; compiled, each number of songs would be its own program.
Here a token knows its song by an index, and attention is FlexAttention, which skips the blocks that nobody may see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic as mark_dynamic
from torch.fx.experimental import _config
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from soundstage_dit.model.attention import Rotation

if TYPE_CHECKING:
    from soundstage_dit.model.dit import DitLayer

_BLOCK: Final = 128
_SETTINGS: Any = _config  # of the compiler, without types


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How songs lie in a sequence: whose each token is, [tokens], and what it may see of tokens and conditions.

    Both are filled up to whole blocks with what is nobody's, as if of one song more.
    """

    owners: Tensor
    all_tokens: BlockMask
    near_tokens: BlockMask
    conditions: BlockMask
    num_conditions: int  # filled up


def lay_out(lengths: Sequence[int], conditions: Sequence[int], window: int, device: torch.device) -> Layout:
    """Lay out songs of so many tokens each, and of so many conditions; `window` is that of the layers that have one."""
    tokens, words = _owners(lengths), _owners(conditions)
    return Layout(
        owners=tokens.to(device),
        all_tokens=see(tokens, tokens, None, device),
        near_tokens=see(tokens, tokens, window, device),
        conditions=see(tokens, words, None, device),
        num_conditions=len(words),
    )


def see(queries: Tensor, keys: Tensor, window: int | None, device: torch.device) -> BlockMask:
    """Let each query see the keys of its own song, at most `window` places away if that is given.

    `queries` [n] and `keys` [m], whole blocks of them, say whose each is, in the order of the songs.
    """
    query_blocks, key_blocks = (owners.unflatten(0, (-1, _BLOCK)) for owners in (queries, keys))
    first_query, last_query = query_blocks[:, :1], query_blocks[:, -1:]  # columns, against rows of keys
    first_key, last_key = key_blocks[:, 0], key_blocks[:, -1]
    is_met = (first_query <= last_key) & (first_key <= last_query)
    is_full = (first_query == last_key) & (first_key == last_query)
    # A tensor, and one even without a window: so that all masks are one program.
    reach = torch.tensor(len(queries) + len(keys) if window is None else window)
    apart = _BLOCK * (torch.arange(len(query_blocks))[:, None] - torch.arange(len(key_blocks))).abs()
    is_met &= apart - _BLOCK < reach
    is_full &= apart + _BLOCK - 1 <= reach
    owner_of_query, owner_of_key, reach = queries.to(device), keys.to(device), reach.to(device)

    def may_see(_song: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (owner_of_query[query] == owner_of_key[key]) & ((query - key).abs() <= reach)

    return BlockMask.from_kv_blocks(
        *_listed(is_met & ~is_full, device),
        *_listed(is_full, device),
        BLOCK_SIZE=_BLOCK,
        mask_mod=may_see,
        seq_lengths=(len(queries), len(keys)),
        compute_q_blocks=False,
    )


def compile_layer(backend: str | Callable[..., Any]) -> Callable[..., Tensor]:
    """Return `run_layer` compiled, by `backend`, for songs of any number and length."""
    # Whole: attention that is left out of a program, or has one too many, would write down all scores without a word.
    compiled = torch.compile(run_layer, fullgraph=True, dynamic=True, backend=backend)
    # Else lengths that are equal the first time would have to be so for ever. It is set around each call: torch keeps a
    # setting for the context that it was made in, and each call of the worker has its own.
    return _SETTINGS.patch(use_duck_shape=False)(compiled)


def run_layer(
    layer: "DitLayer",
    x: Tensor,
    modulation: Tensor,
    owners: Tensor,
    turn: Rotation,
    tokens: BlockMask,
    memory: tuple[Tensor, Tensor],
    conditions: BlockMask,
) -> Tensor:
    """Do what the layer does to x [tokens, width]; modulation is [songs, 6, width], `owners` whose each token is.

    `memory` is the keys and the values of all songs' conditions, each [1, kv_heads, conditions, head_dim].
    """
    by_song = layer.scale_shift_table + modulation
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (by_song[:, index][owners] for index in range(6))
    own = layer.self_attn
    inner = torch.addcmul(shift, layer.self_attn_norm(x), 1 + scale)[None]
    seen = _attend(own.query(inner, turn=turn), *own.remember(inner, turn=turn), tokens)
    x = torch.addcmul(x, own.join([seen]), gate)
    across = layer.cross_attn
    seen = _attend(across.query(layer.cross_attn_norm(x)[None]), *memory, conditions)
    x = x + across.join([seen])
    changed = layer.mlp(torch.addcmul(mlp_shift, layer.mlp_norm(x), 1 + mlp_scale))
    return torch.addcmul(x, changed, mlp_gate)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: BlockMask) -> Tensor:
    seen: Any = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=True)
    return seen[0]


def _owners(lengths: Sequence[int]) -> Tensor:
    # Two blocks at least: what there is one of would be compiled for by itself.
    filled = _BLOCK * max(2, -(-(sum(lengths) + 1) // _BLOCK))
    counts = torch.tensor([*lengths, filled - sum(lengths)])
    return torch.arange(len(counts)).repeat_interleave(counts)


def _listed(is_chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Count the chosen columns of each row, and list them first."""
    indices = is_chosen.int().argsort(dim=-1, descending=True, stable=True)
    counts, listed = (tensor.int().to(device)[None, None] for tensor in (is_chosen.sum(-1), indices))
    # The compiler takes what it finds inside of a mask for fixed.
    mark_dynamic(counts, [2])
    mark_dynamic(listed, [2, 3])
    return counts, listed
