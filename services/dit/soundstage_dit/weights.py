"""Checkpoints of the diffusion stage, in the original layout or diffusers', into networks ready to run."""

import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Model
from transformers.utils.logging import disable_progress_bar

from soundstage_device.weights import build, read_weights
from soundstage_dit.alignment import Heads
from soundstage_dit.architecture import Architecture, encoder_config
from soundstage_dit.conditioning import Conditioner
from soundstage_dit.model.codes import CodeDecoder, CodeEncoder
from soundstage_dit.model.condition import ConditionEncoder
from soundstage_dit.model.dit import Dit
from soundstage_runtime.checkpoint import CheckpointError, Fingerprints, read_json, weight_files
from soundstage_runtime.score import MAX_LATENT_FRAMES
from soundstage_runtime.text import is_control_token
from soundstage_runtime.variant import is_stems

M = TypeVar("M", bound=nn.Module)

TEXT_ENCODER: Final = "Qwen3-Embedding-0.6B"
_SILENCE: Final = "silence_latent"
_NULL: Final = "null_condition_emb"
_DIFFUSERS_PARTS: Final = ("transformer", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer")
_DIFFUSERS_NAMES: Final = (
    ("proj_in.1.", "proj_in_conv."),
    ("proj_out.1.", "proj_out_conv."),
    (".q_proj.", ".to_q."),
    (".k_proj.", ".to_k."),
    (".v_proj.", ".to_v."),
    (".o_proj.", ".to_out.0."),
    (".q_norm.", ".norm_q."),
    (".k_norm.", ".norm_k."),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedModel:
    """Networks on their device, and what the checkpoint is called."""

    name: str
    dit: Dit
    conditioner: Conditioner
    code_encoder: CodeEncoder
    code_decoder: CodeDecoder
    silence: Tensor  # [15000, channels]
    null_condition: Tensor  # [1, width]: no words at all, what guidance moves away from
    channels: int
    variant: str
    model_fingerprint: str
    device: torch.device
    lyric_heads: Heads | None = None  # that follow the singing, where the checkpoint says so

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The networks, which hold all weights but silence and the condition of no words."""
        return (self.dit, self.code_encoder, self.code_decoder, *self.conditioner.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What either layout holds: tensors under the names of our modules, silence as [frames, channels]."""

    architecture: Architecture
    dit: dict[str, Tensor]
    condition_encoder: dict[str, Tensor]
    code_encoder: dict[str, Tensor]
    code_decoder: dict[str, Tensor]
    silence: Tensor
    null_condition: Tensor | None
    text_encoder: Path
    tokenizer: Path
    files: list[Path]


def load(
    folder: Path,
    *,
    text_encoder: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "",
    home: torch.device | None = None,
    text_encoders: dict[str, Qwen3Model] | None = None,
    fingerprints: Fingerprints | None = None,
) -> LoadedModel:
    """Load a checkpoint; raises CheckpointError when it is incomplete, or not what it says it is.

    Its networks begin at `home` if that is another place than the device they will run on. A text encoder that
    `text_encoders` has, by the fingerprint of its files, is shared; else it is added there. So are the digests of files
    that `fingerprints` has.
    """
    fingerprints = fingerprints or Fingerprints()
    contents = (_read_diffusers if is_diffusers(folder) else _read_original)(folder, text_encoder)
    text_fingerprint = fingerprints.begin(_text_files(contents.text_encoder, contents.tokenizer))
    model_fingerprint = fingerprints.begin(contents.files)
    shapes = contents.architecture
    wanted = (MAX_LATENT_FRAMES, shapes.dit.channels)
    if tuple(contents.silence.shape) != wanted:
        raise CheckpointError(f"{folder}: {_SILENCE} is {list(contents.silence.shape)}; {list(wanted)} is wanted")
    null_condition = _check_null(contents, where=str(folder))
    tokenizer = _load_tokenizer(contents.tokenizer)
    silence = contents.silence.to(device=device, dtype=dtype)
    home = home or device
    shared = {} if text_encoders is None else text_encoders

    def make(what: str, module: Callable[[], M], tensors: Mapping[str, Tensor]) -> M:
        return build(module, tensors, where=f"{folder}, {what}", device=home, dtype=dtype)

    dit = make("decoder", lambda: Dit(shapes.dit), contents.dit)
    key = text_fingerprint()  # it is the first to be known
    if key not in shared:
        shared[key] = _load_text_encoder(contents.text_encoder, device=home, dtype=dtype)
    return LoadedModel(
        name=name or folder.name,
        dit=dit,
        conditioner=Conditioner(
            tokenizer=tokenizer,
            text_encoder=shared[key],
            condition_encoder=make(
                "condition encoder", lambda: ConditionEncoder(shapes.condition), contents.condition_encoder
            ),
            silence=silence,
            for_stems=is_stems(shapes.variant),
        ),
        code_encoder=make(
            "tokenizer",
            lambda: CodeEncoder(
                levels=shapes.code_levels, channels=shapes.dit.channels, width=shapes.code_width, pooler=shapes.pooler
            ),
            contents.code_encoder,
        ),
        code_decoder=make(
            "detokenizer",
            lambda: CodeDecoder(levels=shapes.code_levels, width=shapes.code_width, detokenizer=shapes.detokenizer),
            contents.code_decoder,
        ),
        silence=silence,
        null_condition=null_condition.to(device=device, dtype=dtype),
        channels=shapes.dit.channels,
        variant=shapes.variant,
        model_fingerprint=model_fingerprint(),
        device=device,
        lyric_heads=shapes.lyric_heads,
    )


def is_diffusers(folder: Path) -> bool:
    """Say whether a checkpoint is in diffusers' layout; raises CheckpointError when it is in neither."""
    if (folder / "model_index.json").is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    raise CheckpointError(
        f"{folder} holds neither config.json (original layout: a folder such as acestep-v15-turbo) "
        "nor model_index.json (diffusers' layout)"
    )


def find_parts(folder: Path, text_encoder: Path | None) -> list[Path]:
    """Return the directories of a checkpoint's weights, its text encoder's first; raises CheckpointError."""
    if is_diffusers(folder):
        return [text_encoder or folder / "text_encoder", *(folder / name for name in _DIFFUSERS_PARTS)]
    return [text_encoder or folder.parent / TEXT_ENCODER, folder]


def read_architecture(folder: Path) -> Architecture:
    """Read the sizes of a checkpoint's networks; raises CheckpointError."""
    if not is_diffusers(folder):
        config = read_json(folder / "config.json")
        return Architecture.of(config, encoder_config(config), where=str(folder / "config.json"))
    transformer, condition, tokens, _ = (read_json(folder / name / "config.json") for name in _DIFFUSERS_PARTS)
    return Architecture.of(transformer, {**tokens, **condition}, where=str(folder))


def text_encoder_beside(model: str) -> str:
    """Name the text encoder beside a hub folder `owner/name/folder`, which is fetched apart from it; "" for others."""
    parts = model.split("/")
    is_hub_folder = len(parts) == 3 and not Path(model).expanduser().is_dir()
    return "/".join([*parts[:2], TEXT_ENCODER]) if is_hub_folder else ""


def _read_original(folder: Path, text_encoder: Path | None) -> _Contents:
    architecture = read_architecture(folder)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_weights(folder).items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    strange = sorted(set(groups) - {"decoder", "encoder", "tokenizer", "detokenizer", _NULL})
    if strange:
        raise CheckpointError(f"{folder}: unexpected tensors {strange[0]}.*")
    code_encoder, way_out = _split_codebook(_to_diffusers(groups.get("tokenizer", {})))
    text_encoder, _ = find_parts(folder, text_encoder)
    silence = folder / f"{_SILENCE}.pt"
    return _Contents(
        architecture=architecture,
        dit=groups.get("decoder", {}),
        condition_encoder=groups.get("encoder", {}),
        code_encoder=code_encoder,
        code_decoder=way_out | _named("detokenizer", _to_diffusers(groups.get("detokenizer", {}))),
        silence=_read_silence(silence),
        null_condition=groups.get(_NULL, {}).get(""),
        text_encoder=text_encoder,
        tokenizer=text_encoder,
        files=[folder / "config.json", *weight_files(folder), silence, *_text_files(text_encoder, text_encoder)],
    )


def _read_diffusers(folder: Path, text_encoder: Path | None) -> _Contents:
    architecture = read_architecture(folder)
    tokenizer = text_encoder or folder / "tokenizer"
    text_encoder, *parts = find_parts(folder, text_encoder)
    dit, condition_encoder, audio_tokenizer, detokenizer = (read_weights(part) for part in parts)
    code_encoder, way_out = _split_codebook(audio_tokenizer)
    null_condition = condition_encoder.pop(_NULL, None)
    silence = condition_encoder.pop(_SILENCE, None)
    if silence is None or silence.dim() != 3:
        raise CheckpointError(f"{parts[1]}: {_SILENCE} [1, frames, channels] is missing")
    files = [path for part in parts for path in (part / "config.json", *weight_files(part))]
    return _Contents(
        architecture=architecture,
        dit=_to_original(dit),
        condition_encoder=_to_original(condition_encoder),
        code_encoder=code_encoder,
        code_decoder=way_out | _named("detokenizer", detokenizer),
        silence=silence[0],
        null_condition=null_condition,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        files=[*files, *_text_files(text_encoder, tokenizer)],
    )


def _check_null(contents: _Contents, *, where: str) -> Tensor:
    """Return the condition that stands for no words, stored [1, 1, width], as [1, width]."""
    stored, wanted = contents.null_condition, [1, 1, contents.architecture.dit.condition_width]
    if stored is None or list(stored.shape) != wanted:
        found = "missing" if stored is None else list(stored.shape)
        raise CheckpointError(f"{where}: {_NULL} is {found}; {wanted} is wanted")
    return stored[0]


def _split_codebook(tokenizer: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part the way into the codebook, ours under CodeEncoder, from the way out, ours under CodeDecoder."""
    tensors = {name.removeprefix("quantizer."): tensor for name, tensor in tokenizer.items()}
    way_out = {name: tensors.pop(name) for name in list(tensors) if name.startswith("project_out.")}
    return tensors, way_out


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_replace(name, _DIFFUSERS_NAMES): tensor for name, tensor in tensors.items()}


def _to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    back = [(theirs, ours) for ours, theirs in _DIFFUSERS_NAMES]
    return {_replace(name, back): tensor for name, tensor in tensors.items()}


def _replace(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def _read_silence(path: Path) -> Tensor:
    """Read silence, stored [1, channels, frames], as [frames, channels]."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} is not a tensor file: {error}") from error
    if not isinstance(stored, Tensor) or stored.dim() != 3:
        raise CheckpointError(f"{path} must hold one tensor [1, channels, frames]")
    return stored[0].T.contiguous()


def _text_files(text_encoder: Path, tokenizer: Path) -> list[Path]:
    files = [text_encoder / "config.json", tokenizer / "tokenizer.json"]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{' and '.join(missing)} missing; name a directory or hub id as text_encoder: "
            f"ACE-Step/Ace-Step1.5/{TEXT_ENCODER}"
        )
    return [*files, *weight_files(text_encoder)]


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    # Not by way of AutoTokenizer: a class of its choice may remake parts that tokenizer.json says.
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    loose = [token for token in tokenizer.get_added_vocab() if not is_control_token(token)]
    if loose:
        raise CheckpointError(f"{folder}: the added token {loose[0]!r} is not one that requests are searched for")
    return tokenizer


def _load_text_encoder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Qwen3Model:
    disable_progress_bar()  # a log is no place for it
    try:
        model, report = cast(Any, Qwen3Model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder} does not load as a Qwen3 text encoder: {error}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:
            raise CheckpointError(f"{folder}: {kind.replace('_keys', '')} {sorted(report[kind])[0]}")
    return model.requires_grad_(False).eval().to(device)
