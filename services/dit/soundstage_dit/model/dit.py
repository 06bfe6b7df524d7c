"""The diffusion transformer: noisy latents in, velocity out, for any number of unlike songs at once."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, cast

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from soundstage_device.offload import Piece, relay
from soundstage_dit.model.adapter import NOTHING, Adaptation, Additions, find_additions, project
from soundstage_dit.model.attention import CrossAttention, Mlp, Rotation, SelfAttention, rotation
from soundstage_dit.model.shape import DitShape, StackShape
from soundstage_dit.model.together import compile_layer, lay_out

_log = structlog.get_logger()

_SINUSOIDS = 256
_LONGEST_PERIOD = 10_000
_TIME_SCALE = 1_000
_PIECE = 768  # tokens: what so many are on their way through a layer stays in a CPU's cache


class TimeEmbedding(nn.Module):
    """Embeds a diffusion time in [0, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(_SINUSOIDS, width)
        self.linear_2 = nn.Linear(width, width)
        self.time_proj = nn.Linear(width, 6 * width)

    def forward(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Map times [songs] to an embedding [songs, width] and a layer modulation [songs, 6, width]."""
        # In float32 whatever the weights are: 1000 t has no room in half precision.
        half = _SINUSOIDS // 2
        rates = torch.exp(torch.arange(half, device=times.device) * (-math.log(_LONGEST_PERIOD) / half))
        angles = torch.outer(times.float() * _TIME_SCALE, rates)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        embedding = self.linear_2(F.silu(self.linear_1(waves)))
        return embedding, self.time_proj(F.silu(embedding)).unflatten(-1, (6, -1))


class DitLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward; time modulates the first and the last."""

    def __init__(self, shape: StackShape, window: int | None) -> None:
        super().__init__()
        self.self_attn_norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.self_attn = SelfAttention(shape, window)
        self.cross_attn_norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.cross_attn = CrossAttention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width, eps=shape.eps)
        self.mlp = Mlp(shape)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, shape.width))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        lengths: Sequence[int],
        turn: Rotation,
        memories: Sequence[Tensor],
        additions: Additions = NOTHING,
    ) -> Tensor:
        """Map x [tokens, width]; `modulation` is [songs, 6, width], `lengths` how many tokens each has."""
        x = self.see_song(x, modulation, lengths, turn, additions)
        if x.device.type != "cpu" or additions or len(lengths) > 1:
            return self.see_conditions(x, modulation, lengths, memories, additions)
        # From here on no token sees another.
        pieces = [self.see_conditions(piece, modulation, [len(piece)], memories) for piece in x.split(_PIECE)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def see_song(
        self,
        x: Tensor,
        modulation: Tensor,
        lengths: Sequence[int],
        turn: Rotation,
        additions: Additions = NOTHING,
    ) -> Tensor:
        """Do the first part of `forward`: self-attention."""
        shift, scale, gate = (self.scale_shift_table + modulation)[:, :3].unbind(dim=1)
        seen = self.self_attn(_modulate(self.self_attn_norm(x), shift, scale, lengths), lengths, turn, additions)
        return _add_gated(x, seen, gate, lengths)

    def see_conditions(
        self,
        x: Tensor,
        modulation: Tensor,
        lengths: Sequence[int],
        memories: Sequence[Tensor],
        additions: Additions = NOTHING,
    ) -> Tensor:
        """Do the second part of `forward`: cross-attention and feed-forward."""
        x = x + self.cross_attn(self.cross_attn_norm(x), lengths, memories, additions)
        shift, scale, gate = (self.scale_shift_table + modulation)[:, 3:].unbind(dim=1)
        changed = self.mlp(_modulate(self.mlp_norm(x), shift, scale, lengths), additions)
        return _add_gated(x, changed, gate, lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """Songs one after another, as the layers see them."""

    x: Tensor  # [tokens, width]
    lengths: Sequence[int]  # tokens of each song
    turn: Rotation
    embedding: Tensor  # [songs, width]
    modulation: Tensor  # [songs, 6, width]
    additions: Additions


class Dit(nn.Module):
    """Predicts the velocity, noise minus data, of each song at its own time."""

    def __init__(self, shape: DitShape) -> None:
        super().__init__()
        stack = shape.stack
        patch = shape.patch
        # The checkpoints keep these two in a sequence, at index 1.
        self.proj_in = nn.Sequential(nn.Identity(), nn.Conv1d(shape.in_channels, stack.width, patch, stride=patch))
        self.proj_out = nn.Sequential(
            nn.Identity(), nn.ConvTranspose1d(stack.width, shape.channels, patch, stride=patch)
        )
        self.time_embed = TimeEmbedding(stack.width)
        self.time_embed_r = TimeEmbedding(stack.width)
        self.condition_embedder = nn.Linear(shape.condition_width, stack.width)
        self.layers = cast("list[DitLayer]", nn.ModuleList([DitLayer(stack, window) for window in stack.windows]))
        self.norm_out = nn.RMSNorm(stack.width, eps=stack.eps)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, stack.width))
        self.shape = shape
        self._compiled: Callable[..., Tensor] | None = None
        self._walk: Callable[[Iterable[DitLayer]], Iterator[DitLayer]] = iter

    def remember(self, conditions: Tensor, adaptations: Sequence[Adaptation] = ()) -> Tensor:
        """Return the keys and values of conditions [conditions, condition_width] in every layer.

        They are [layers, 2, kv_heads, conditions, head_dim], and the same at every step of a song.
        """
        additions = find_additions(self, [(slice(None), adaptations)])
        embedded = project(self.condition_embedder, conditions, additions)
        return torch.stack(
            [torch.stack(layer.cross_attn.remember(embedded, additions)) for layer in self._walk(self.layers)]
        )

    def forward(
        self,
        latents: Sequence[Tensor],
        times: Tensor,
        contexts: Sequence[Tensor],
        memories: Sequence[Tensor],
        adaptations: Sequence[Sequence[Adaptation]] | None = None,
    ) -> list[Tensor]:
        """Return each song's velocity [frames, channels], float32; songs of any lengths never see one another.

        On a CPU a song's is the same to the bit whatever is beside it. Per song: latents [frames, channels], a time in
        `times` [songs], a context [frames, in_channels - channels], what `remember` gave, and the adapters at work;
        None for none in any song.
        """
        uses: Sequence[Sequence[Adaptation]] = adaptations or [()] * len(latents)
        velocities: dict[int, Tensor] = {}
        for songs in self._companies(uses, times.device):
            frames, shown, remembered = ([each[song] for song in songs] for each in (latents, contexts, memories))
            found = self.run(frames, times[songs], shown, remembered, [uses[song] for song in songs])
            velocities |= zip(songs, found, strict=True)
        return [velocities[song] for song in range(len(latents))]

    def run(
        self,
        latents: Sequence[Tensor],
        times: Tensor,
        contexts: Sequence[Tensor],
        memories: Sequence[Tensor],
        adaptations: Sequence[Sequence[Adaptation]],
    ) -> list[Tensor]:
        """Do what `forward` does in one sequence, where a song beside others may differ by how sums are rounded."""
        packed = self._pack(latents, times, contexts, adaptations)
        x = None if packed.additions else self._run_compiled(packed, memories)
        if x is None:
            x, place = packed.x, (packed.modulation, packed.lengths)
            for layer, memory in zip(self._walk(self.layers), zip(*memories, strict=True), strict=True):
                x = layer(x, *place, packed.turn, memory, packed.additions)
        shift, scale = (self.scale_shift_table + packed.embedding[:, None]).unbind(dim=1)
        x = _modulate(self.norm_out(x), shift, scale, packed.lengths)
        patches = [length * self.shape.patch for length in packed.lengths]
        frames = self.proj_out(x.T[None])[0].T.float().split(patches)
        return [song[: len(asked)] for song, asked in zip(frames, latents, strict=True)]

    @property
    def is_compiled(self) -> bool:
        """Whether the layers run by a compiled function."""
        return self._compiled is not None

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Run the layers by one compiled function, but for steps of songs with adapters.

        It is compiled at the first step. Where that fails the layers run as they are.
        """
        self._compiled = compile_layer(backend)

    def offload_layers(self, device: torch.device) -> None:
        """Bring all but the layers to a device; each of those comes when it is used, one ahead of its use."""
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pieces: dict[nn.Module, Piece] = {layer: Piece(layer.modules(), device, stream) for layer in self.layers}
        self._walk = partial(relay, pieces=pieces)
        ends = [part for name, child in self.named_children() if name != "layers" for part in child.modules()]
        Piece([self, *ends], device).take()

    def _companies(self, adaptations: Sequence[Sequence[Adaptation]], device: torch.device) -> list[list[int]]:
        """Part songs into those that go through the layers together."""
        if device.type == "cpu" and self._compiled is None:
            # It has its hands full with one, and a product over other rows beside a song's would round differently.
            return [[song] for song in range(len(adaptations))]
        # One song with an adapter would keep all others from the compiled way.
        plain, adapted = ([i for i, uses in enumerate(adaptations) if bool(uses) is has] for has in (False, True))
        return [songs for songs in (plain, adapted) if songs]

    def _run_compiled(self, packed: "_Packed", memories: Sequence[Tensor]) -> Tensor | None:
        if self._compiled is None:
            return None
        stack = self.shape.stack
        windows = [window for window in stack.windows if window is not None]
        counts = [memory.shape[-2] for memory in memories]
        layout = lay_out(packed.lengths, counts, max(windows, default=0), packed.x.device)
        filling = len(layout.owners) - len(packed.x)
        x = F.pad(packed.x, (0, 0, 0, filling))
        turn = [F.pad(rows, (0, 0, 0, 0, 0, filling)) for rows in packed.turn]
        modulation = F.pad(packed.modulation, (0, 0, 0, 0, 0, 1))
        nobodys = memories[0].new_zeros(*memories[0].shape[1:3], layout.num_conditions - sum(counts), stack.head_dim)
        for layer, words in zip(self._walk(self.layers), zip(*memories, strict=True), strict=True):
            seen = layout.all_tokens if layer.self_attn.window is None else layout.near_tokens
            # A layer's at a time: those of all layers would take as much again as the songs themselves.
            keys, values = torch.cat([*words, nobodys], dim=-2)[:, None]
            try:
                x = self._compiled(
                    layer, x, modulation, layout.owners, tuple(turn), seen, (keys, values), layout.conditions
                )
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                _log.warning("compile_failed", error=type(error).__name__, why=str(error).strip().partition("\n")[0])
                self._compiled = None
                return None
        return x[: len(packed.x)]

    def attention(
        self,
        latents: Tensor,
        time: float,
        context: Tensor,
        memory: Tensor,
        adaptations: Sequence[Adaptation] = (),
        *,
        heads: Mapping[int, Sequence[int]],
        conditions: slice,
    ) -> list[Tensor]:
        """Return how much each head attends to `conditions` in one song, [conditions, patches], float32 on the host.

        `heads` are chosen by layer. Layers beyond them are not run, and `memory` need not have them.
        """
        packed = self._pack([latents], torch.tensor([time], device=latents.device), [context], [adaptations])
        x, place, additions = packed.x, (packed.modulation, packed.lengths), packed.additions
        seen: list[Tensor] = []
        for index, layer in enumerate(self._walk(self.layers[: max(heads) + 1])):
            x = layer.see_song(x, *place, packed.turn, additions)
            if chosen := heads.get(index):
                normed = layer.cross_attn_norm(x)
                weights = layer.cross_attn.weights(normed, memory[index], chosen, conditions, additions)
                seen += weights.mT.cpu()
            x = layer.see_conditions(x, *place, [memory[index]], additions)
        return seen

    def _pack(
        self,
        latents: Sequence[Tensor],
        times: Tensor,
        contexts: Sequence[Tensor],
        adaptations: Sequence[Sequence[Adaptation]],
    ) -> "_Packed":
        patch, stack = self.shape.patch, self.shape.stack
        inputs = [
            F.pad(torch.cat(pair, dim=-1), (0, 0, 0, -len(pair[0]) % patch))
            for pair in zip(contexts, latents, strict=True)
        ]
        lengths = [len(frames) // patch for frames in inputs]
        # Every song is a whole number of patches, so no patch holds frames of two.
        x = self.proj_in(torch.cat(inputs).to(self.scale_shift_table.dtype).T[None])[0].T
        turn = rotation(lengths, stack.head_dim, stack.rope_theta, x.device)
        still_embedding, still_modulation = self._standing_still
        embedding, modulation = self.time_embed(times)
        return _Packed(
            x=x,
            lengths=lengths,
            turn=turn,
            embedding=embedding + still_embedding,
            modulation=modulation + still_modulation,
            additions=find_additions(self, _spans(lengths, adaptations)),
        )

    @cached_property
    def _standing_still(self) -> tuple[Tensor, Tensor]:
        # The second embedding is of the interval a step is averaged over, which is always 0 here.
        return self.time_embed_r(torch.zeros(1, device=self.scale_shift_table.device))


def _spans(
    lengths: Sequence[int], adaptations: Sequence[Sequence[Adaptation]]
) -> list[tuple[slice, Sequence[Adaptation]]]:
    """Tell which tokens have which adapters; neighbours that have the same are one span."""
    spans: list[tuple[slice, Sequence[Adaptation]]] = []
    end = 0
    for _, songs in groupby(zip(lengths, adaptations, strict=True), key=lambda song: id(song[1])):
        together = list(songs)
        start, end = end, end + sum(length for length, _ in together)
        spans.append((slice(start, end), together[0][1]))
    return spans


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, lengths: Sequence[int]) -> Tensor:
    """Scale and shift each song's part of x [tokens, width] by its own row [songs, width]."""
    modulated = torch.empty_like(x)
    for song, (part, into) in enumerate(zip(x.split(lengths), modulated.split(lengths), strict=True)):
        torch.addcmul(shift[song], part, 1 + scale[song], out=into)
    return modulated


def _add_gated(x: Tensor, change: Tensor, gate: Tensor, lengths: Sequence[int]) -> Tensor:
    """Add a change to x [tokens, width], each song's part of it times the song's own row [songs, width]."""
    changed = torch.empty_like(x)
    parts = zip(x.split(lengths), change.split(lengths), changed.split(lengths), strict=True)
    for song, (part, change_of_part, into) in enumerate(parts):
        torch.addcmul(part, change_of_part, gate[song], out=into)
    return changed
