"""Tiny diffusion checkpoints, in the original layout and in diffusers', of the same weights for the same seed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

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
_TEXT_WIDTH = 48
_CHANNELS = 64
_LAYERS = 4
_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_XL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 8,  # 8 heads of 16 are wider than the hidden size, as in the real XL
    "num_key_value_heads": 2,
}
_SHARED: dict[str, Any] = {
    "head_dim": 16,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": 16,
}
_TRANSFORMER: dict[str, Any] = {
    "num_hidden_layers": _LAYERS,
    "in_channels": 3 * _CHANNELS,
    "audio_acoustic_hidden_dim": _CHANNELS,
    "patch_size": 2,
    "layer_types": ["sliding_attention", "full_attention"] * (_LAYERS // 2),
}
_CONDITION: dict[str, Any] = {
    "text_hidden_dim": _TEXT_WIDTH,
    "timbre_hidden_dim": _CHANNELS,
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 2,
}
_POOLER: dict[str, Any] = {
    "audio_acoustic_hidden_dim": _CHANNELS,
    "pool_window_size": 5,
    "num_attention_pooler_hidden_layers": 2,
}
_FSQ: dict[str, Any] = {"fsq_dim": 64, "fsq_input_levels": [8, 8, 8, 5, 5, 5], "fsq_input_num_quantizers": 1}
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


def write_original(root: Path, *, xl: bool = False, version: Version = "turbo", seed: int = 0) -> Path:
    """Write `acestep-v15[-xl]-VERSION` and the text encoder beside it into root; return the former's directory."""
    parts = _make(xl=xl, version=version, seed=seed)
    folder = root / f"acestep-v15-{'xl-' if xl else ''}{version}"
    folder.mkdir(parents=True, exist_ok=True)

    config = (_XL if xl else _ENCODER) | _SHARED | _TRANSFORMER | _named(version) | _CONDITION | _POOLER | _FSQ
    config |= {"architectures": ["AceStepConditionGenerationModel"], "use_sliding_window": True}
    if xl:
        config |= {f"encoder_{name}": value for name, value in _ENCODER.items()}
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


def write_diffusers(folder: Path, *, xl: bool = False, version: Version = "turbo", seed: int = 0) -> Path:
    """Write a pipeline directory, all but its `vae` folder; return it."""
    parts = _make(xl=xl, version=version, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    library = {"text_encoder": "transformers", "tokenizer": "transformers"}
    index: dict[str, Any] = {"_class_name": "AceStepPipeline", "vae": ["diffusers", "AutoencoderOobleck"]}
    for name in (*_Parts.__slots__, "scheduler"):
        part = scheduler if name == "scheduler" else getattr(parts, name)
        part.save_pretrained(folder / name)
        index[name] = [library.get(name, "diffusers"), type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def _named(version: Version) -> dict[str, Any]:
    return {"is_turbo": version == "turbo", "model_version": version} | (
        {"is_lego_sft": True} if version == "sft-stems" else {}
    )


def _make(*, xl: bool, version: Version, seed: int) -> _Parts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # First, so that both sizes share one text encoder, as the released ones do.
        tokenizer = byte_tokenizer(appends_end=True)
        text_config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
        )
        text_encoder = _enliven(Qwen3Model(text_config))
        parts = _Parts(
            transformer=_enliven(
                AceStepTransformer1DModel(
                    **(_XL if xl else _ENCODER),
                    **_SHARED,
                    **_TRANSFORMER,
                    **_named(version),
                    encoder_hidden_size=_ENCODER["hidden_size"] if xl else None,
                )
            ),
            condition_encoder=_enliven(AceStepConditionEncoder(**_ENCODER, **_SHARED, **_CONDITION)),
            audio_tokenizer=_enliven(AceStepAudioTokenizer(**_ENCODER, **_SHARED, **_POOLER, **_FSQ)),
            audio_token_detokenizer=_enliven(AceStepAudioTokenDetokenizer(**_ENCODER, **_SHARED, **_POOLER)),
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
