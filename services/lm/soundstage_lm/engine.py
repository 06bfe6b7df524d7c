"""From settings to a planner on an engine."""

from dataclasses import dataclass
from pathlib import Path

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_device.device import choose_device, choose_dtype, dtype_name
from soundstage_lm.composer import Composer
from soundstage_lm.grammar import Grammar
from soundstage_lm.settings import LmSettings
from soundstage_lm.torch_engine import TorchWriter
from soundstage_lm.weights import load_checkpoint
from soundstage_runtime.checkpoint import locate
from soundstage_runtime.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A planner, what StageService says of it, and where it runs."""

    composer: Composer
    model: StageModel
    device: str


def load_composer(settings: LmSettings, worker: Worker) -> Loaded:
    """Load the planner that the settings name. Raises CheckpointError."""
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    checkpoint = load_checkpoint(locate(settings.model), device=device, dtype=dtype)
    checkpoint.model.pack()
    grammar = Grammar(checkpoint.tokenizer, max_duration_s=settings.max_duration_s)
    composer = Composer(
        TorchWriter(checkpoint, worker, grammar, kv_cache_gb=settings.kv_cache_gb),
        checkpoint.tokenizer,
        fingerprint=checkpoint.fingerprint,
        max_duration_s=settings.max_duration_s,
        max_tokens=checkpoint.model.config.max_position_embeddings,
    )
    model = StageModel(
        name=Path(settings.model).name,
        variant=checkpoint.variant,
        model_fingerprint=checkpoint.fingerprint,
        dtype=dtype_name(dtype),
    )
    return Loaded(composer=composer, model=model, device=str(device))
