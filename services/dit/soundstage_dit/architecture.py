"""What a checkpoint's configuration says: the shapes of its networks and its place in the family."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from soundstage_dit.alignment import Heads
from soundstage_dit.model.shape import ConditionShape, DitShape, StackShape
from soundstage_runtime.checkpoint import CheckpointError
from soundstage_runtime.score import LATENTS_PER_CODE

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shapes of all networks; `pooler` and `detokenizer` are given to diffusers' modules as they are."""

    variant: str
    dit: DitShape
    condition: ConditionShape
    code_levels: tuple[int, ...]
    code_width: int
    pooler: dict[str, Any]
    detokenizer: dict[str, Any]
    lyric_heads: Heads | None = None

    @classmethod
    def of(cls, config: Config, encoder_config: Config, *, where: str) -> Self:
        """Read the configurations of the transformer and of the encoders; raises CheckpointError naming `where`."""
        try:
            _check_codes(encoder_config)
            return cls(
                variant=_variant(config),
                dit=_dit(config),
                condition=_condition(encoder_config, has_timbre_token=_is_xl(config)),
                code_levels=tuple(encoder_config["fsq_input_levels"]),
                code_width=encoder_config["fsq_dim"],
                pooler={name: encoder_config[name] for name in _POOLER},
                detokenizer={name: encoder_config[name] for name in _DETOKENIZER},
                lyric_heads=_lyric_heads(config),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: the configuration lacks a usable {error}") from error


_POOLER = (
    "hidden_size",
    "intermediate_size",
    "num_attention_pooler_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_theta",
    "rms_norm_eps",
    "sliding_window",
)
_DETOKENIZER = (*_POOLER, "audio_acoustic_hidden_dim", "pool_window_size")
_ENCODER_OWN = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def encoder_config(config: Config) -> Config:
    """Return what the encoders go by in a configuration that serves all networks: XL gives them sizes of their own."""
    own = {name: config.get(f"encoder_{name}") for name in _ENCODER_OWN}
    return {**config, **{name: value for name, value in own.items() if value is not None}}


def _is_xl(config: Config) -> bool:
    return config.get("encoder_hidden_size") not in (None, config["hidden_size"])


def _variant(config: Config) -> str:
    # Releases are called by longer names too, as turbo-rl and base-sft-fix-inst.
    called = "turbo" if config.get("is_turbo") else str(config.get("model_version"))
    version = next((version for version in ("turbo", "sft") if version in called), "base")
    stems = "-stems" if config.get("is_lego_sft") else ""
    return f"{'xl-' if _is_xl(config) else ''}{version}{stems}"


def _lyric_heads(config: Config) -> Heads | None:
    """Read which heads follow the singing, lists of heads by layer; no release says so."""
    told = config.get("lyric_alignment_heads")
    if not told:
        return None
    heads = {int(layer): tuple(map(int, listed)) for layer, listed in told.items()}
    num_layers, num_heads = config["num_hidden_layers"], config["num_attention_heads"]
    for layer, listed in heads.items():
        if not (0 <= layer < num_layers and listed and all(0 <= head < num_heads for head in listed)):
            raise ValueError(f"'lyric_alignment_heads': there are {num_layers} layers of {num_heads} heads")
    return heads


def _check_codes(config: Config) -> None:
    # The planner's language: one code for 5 frames.
    for name, wanted in (("fsq_input_num_quantizers", 1), ("pool_window_size", LATENTS_PER_CODE)):
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name!r}: it is {config[name]}; {wanted} is wanted")


def _dit(config: Config) -> DitShape:
    return DitShape(
        stack=_stack(config, config["num_hidden_layers"]),
        condition_width=config.get("encoder_hidden_size") or config["hidden_size"],
        in_channels=config["in_channels"],
        channels=config["audio_acoustic_hidden_dim"],
        patch=config["patch_size"],
    )


def _condition(config: Config, *, has_timbre_token: bool) -> ConditionShape:
    return ConditionShape(
        lyric=_stack(config, config["num_lyric_encoder_hidden_layers"]),
        timbre=_stack(config, config["num_timbre_encoder_hidden_layers"]),
        text_width=config["text_hidden_dim"],
        channels=config["timbre_hidden_dim"],
        has_timbre_token=has_timbre_token,
    )


def _stack(config: Config, num_layers: int) -> StackShape:
    kinds: list[str] = config.get("layer_types") or ["sliding_attention", "full_attention"] * num_layers
    if len(kinds) < num_layers:
        raise ValueError(f"'layer_types': {num_layers} layers, {len(kinds)} types")
    window: int | None = config["sliding_window"] if config.get("use_sliding_window", True) else None
    return StackShape(
        width=config["hidden_size"],
        mlp_width=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds[:num_layers]),
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
    )
