"""Small diffusion checkpoints, in the original layout and in diffusers', of the same weights for the same seed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from soundstage_cli.tiny.tokenizer import byte_tokenizer

M = TypeVar("M", bound=nn.Module)
Version = Literal["turbo", "base", "sft", "sft-stems"]  # of the same weights for the same seed

TEXT_ENCODER = "Qwen3-Embedding-0.6B"
_CHANNELS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A checkpoint's size: its encoders, its transformer where that is another size, and what they share."""

    encoder: dict[str, Any]
    transformer: dict[str, Any] | None = None
    head_dim: int = 16
    sliding_window: int = 16
    layers: int = 4
    lyric_layers: int = 2
    timbre_layers: int = 2
    text: dict[str, Any] = field(default_factory=lambda: _text(48, 96, 2, 4, 2, 16))

    @property
    def shared(self) -> dict[str, Any]:
        """What all attention layers have in common."""
        return {
            "head_dim": self.head_dim,
            "rope_theta": 1_000_000.0,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": 1e-6,
            "sliding_window": self.sliding_window,
        }

    @property
    def stack(self) -> dict[str, Any]:
        """The transformer's layers and ends."""
        return {
            "num_hidden_layers": self.layers,
            "in_channels": 3 * _CHANNELS,
            "audio_acoustic_hidden_dim": _CHANNELS,
            "patch_size": 2,
            "layer_types": ["sliding_attention", "full_attention"] * (self.layers // 2),
        }

    @property
    def condition(self) -> dict[str, Any]:
        """The condition encoder's ends and depth."""
        return {
            "text_hidden_dim": self.text["hidden_size"],
            "timbre_hidden_dim": _CHANNELS,
            "num_lyric_encoder_hidden_layers": self.lyric_layers,
            "num_timbre_encoder_hidden_layers": self.timbre_layers,
        }

    @property
    def quantizer(self) -> dict[str, Any]:
        """The audio tokenizer's codebook."""
        width = self.encoder["hidden_size"]
        return {"fsq_dim": width, "fsq_input_levels": [8, 8, 8, 5, 5, 5], "fsq_input_num_quantizers": 1}


def _widths(hidden: int, intermediate: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return _widths(hidden, intermediate, heads, kv_heads) | {"num_hidden_layers": layers, "head_dim": head_dim}


TINY = Size(encoder=_widths(64, 128, 4, 2))
# 8 heads of 16 are wider than the hidden size, as in the real XL.
TINY_XL = Size(encoder=TINY.encoder, transformer=_widths(96, 160, 8, 2))
MID = Size(
    encoder=_widths(512, 1536, 8, 4),
    head_dim=64,
    sliding_window=128,
    layers=8,
    text=_text(256, 512, 2, 4, 2, 16),
)
# The released 2B, for measurements: 3 billion parameters with the text encoder.
REAL = Size(
    encoder=_widths(2048, 6144, 16, 8),
    head_dim=128,
    sliding_window=128,
    layers=24,
    lyric_layers=8,
    timbre_layers=4,
    text=_text(1024, 3072, 28, 16, 8, 128) | {"vocab_size": 151_669},
)
_POOLER: dict[str, Any] = {
    "audio_acoustic_hidden_dim": _CHANNELS,
    "pool_window_size": 5,
    "num_attention_pooler_hidden_layers": 2,
}
_ORIGINAL_NAMES = (
    ("proj_in_conv", "proj_in.1"),
    ("proj_out_conv", "proj_out.1"),
    (".to_q.", ".q_proj."),
    (".to_k.", ".k_proj."),
    (".to_v.", ".v_proj."),
    (".to_out.0.", ".o_proj."),
    (".norm_q.", ".q_norm."),
    (".norm_k.", ".k_norm."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    transformer: AceStepTransformer1DModel
    condition_encoder: AceStepConditionEncoder
    audio_tokenizer: AceStepAudioTokenizer
    audio_token_detokenizer: AceStepAudioTokenDetokenizer
    text_encoder: Qwen3Model
    tokenizer: PreTrainedTokenizerFast


def write_original(
    root: Path, *, xl: bool = False, version: Version = "turbo", seed: int = 0, size: Size | None = None
) -> Path:
    """Write `acestep-v15[-xl]-VERSION` and the text encoder beside it into root; return the former's directory."""
    size = size or (TINY_XL if xl else TINY)
    parts = _make(size, version=version, seed=seed)
    folder = root / f"acestep-v15-{'xl-' if xl else ''}{version}"
    folder.mkdir(parents=True, exist_ok=True)

    config = (size.transformer or size.encoder) | size.shared | size.stack | _named(version)
    config |= size.condition | size.quantizer | _POOLER
    config |= {"architectures": ["AceStepConditionGenerationModel"], "use_sliding_window": True}
    # Random weights: none of the heads follows anything, but that can be looked at as in a model whose heads do.
    config |= {"lyric_alignment_heads": {layer: list(range(config["num_attention_heads"])) for layer in (0, 1)}}
    if size.transformer:
        config |= {f"encoder_{name}": value for name, value in size.encoder.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    conditions = parts.condition_encoder.state_dict()
    silence = conditions.pop("silence_latent")
    torch.save(silence.transpose(1, 2).contiguous(), folder / "silence_latent.pt")
    tensors = {"null_condition_emb": conditions.pop("null_condition_emb")}
    tensors |= _rename("decoder", parts.transformer.state_dict()) | _rename("encoder", conditions)
    tensors |= _rename("tokenizer", parts.audio_tokenizer.state_dict())
    tensors |= _rename("detokenizer", parts.audio_token_detokenizer.state_dict())
    if xl:
        _save_sharded(tensors, folder)
    else:
        save_file(tensors, folder / "model.safetensors")

    parts.text_encoder.save_pretrained(root / TEXT_ENCODER)
    parts.tokenizer.save_pretrained(root / TEXT_ENCODER)
    return folder


def write_diffusers(
    folder: Path,
    *,
    xl: bool = False,
    version: Version = "turbo",
    seed: int = 0,
    size: Size | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a pipeline directory, all but its `vae` folder; return it. Weights are drawn on `device`."""
    parts = _make(size or (TINY_XL if xl else TINY), version=version, seed=seed, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    library = {"text_encoder": "transformers", "tokenizer": "transformers"}
    index: dict[str, Any] = {"_class_name": "AceStepPipeline", "vae": ["diffusers", "AutoencoderOobleck"]}
    for name in (*_Parts.__slots__, "scheduler"):
        part = scheduler if name == "scheduler" else getattr(parts, name)
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # theirs warns of layers to be kept in float32, of which there are none
        cast(Any, part).save_pretrained(folder / name)
        index[name] = [library.get(name, "diffusers"), type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def _named(version: Version) -> dict[str, Any]:
    return {"is_turbo": version == "turbo", "model_version": version} | (
        {"is_lego_sft": True} if version == "sft-stems" else {}
    )


def _make(size: Size, *, version: Version, seed: int, device: str = "cpu") -> _Parts:
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        # First, so that both sizes share one text encoder, as the released ones do.
        tokenizer = byte_tokenizer(appends_end=True)
        text: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096} | size.text
        text_encoder = _enliven(Qwen3Model(Qwen3Config(**text)))
        parts = _Parts(
            transformer=_enliven(
                AceStepTransformer1DModel(
                    **(size.transformer or size.encoder),
                    **size.shared,
                    **size.stack,
                    **_named(version),
                    encoder_hidden_size=size.encoder["hidden_size"] if size.transformer else None,
                )
            ),
            condition_encoder=_enliven(AceStepConditionEncoder(**size.encoder, **size.shared, **size.condition)),
            audio_tokenizer=_enliven(AceStepAudioTokenizer(**size.encoder, **size.shared, **size.quantizer, **_POOLER)),
            audio_token_detokenizer=_enliven(AceStepAudioTokenDetokenizer(**size.encoder, **size.shared, **_POOLER)),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        parts.condition_encoder.silence_latent.normal_(std=0.1)
    return parts


@torch.no_grad()
def _enliven(module: M) -> M:
    """Redraw all weights so that every layer, gate and norm changes the signal and none of them blows it up."""
    for name, weight in module.named_parameters():
        if "norm" in name:
            weight.normal_(mean=1.0, std=0.1)
        elif name.endswith(("bias", "table")) or "special_token" in name:
            weight.normal_(std=0.3)
        elif weight.dim() >= 2:
            weight.normal_(std=weight[0].numel() ** -0.5)
        else:
            weight.normal_()
    return module


def original_name(name: str) -> str:
    """Name a tensor of diffusers' transformer as the original layout does."""
    for ours, original in _ORIGINAL_NAMES:
        name = name.replace(ours, original)
    return name


def _rename(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{original_name(name)}": tensor for name, tensor in tensors.items()}


def _save_sharded(tensors: dict[str, Tensor], folder: Path) -> None:
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
