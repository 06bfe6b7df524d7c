"""The shapes of the networks: numbers that a checkpoint's configuration gives."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StackShape:
    """A stack of transformer layers; `windows` has one entry a layer: tokens seen to either side, None for all."""

    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope_theta: float
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DitShape:
    """The diffusion transformer; `in_channels` counts context and latents, `patch` is latent frames a token."""

    stack: StackShape
    condition_width: int
    in_channels: int
    channels: int
    patch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionShape:
    """The condition encoder; `has_timbre_token` says whether timbre is read from a learned leading token."""

    lyric: StackShape
    timbre: StackShape
    text_width: int
    channels: int
    has_timbre_token: bool
