"""From settings to a planner on an engine."""

import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog
import torch

from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_budget.engine_choice import DtypeChoice, EngineName, choose_engine
from soundstage_budget.installed import find_vllm
from soundstage_budget.need import song_tokens
from soundstage_device.budget import memory_bytes, pin_budget, read_budget
from soundstage_device.device import choose_device, describe_card
from soundstage_device.worker import loading
from soundstage_lm.composer import Composer
from soundstage_lm.grammar import Grammar
from soundstage_lm.scoring import Judge
from soundstage_lm.settings import LmSettings
from soundstage_lm.size import fit, read_size
from soundstage_lm.torch_engine import TorchWriter
from soundstage_lm.torch_judge import TorchJudge
from soundstage_lm.weights import Outline, begin_fingerprint, load_checkpoint, load_outline
from soundstage_lm.writer import Writer
from soundstage_runtime.checkpoint import locate
from soundstage_runtime.worker import Worker

_REMEDIES: Final = "more gpu_memory would do, or less kv_cache_gb, or a smaller planner"
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A planner, what StageService says of it, where it runs, how to end its engine, and how to learn of its loss.

    `settings` are those it was loaded with, lowered to what fits.
    """

    composer: Composer
    settings: LmSettings
    model: StageModel
    device: str
    close: Callable[[], None]
    lost: Callable[[], Coroutine[Any, Any, str]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Engine:
    writer: Writer
    max_tokens: int
    close: Callable[[], None]
    lost: Callable[[], Coroutine[Any, Any, str]] | None = None  # returns when it is, where that can happen
    judge: Judge | None = None  # where it can score


async def load_composer(settings: LmSettings, worker: Worker) -> Loaded:
    """Load the planner that the settings name, on the engine that fits the device and within its memory.

    Raises CheckpointError, DeviceError, DoesNotFitError and LoadMemoryError.
    """
    folder = locate(settings.model)
    hashed = begin_fingerprint(folder)
    outline = load_outline(folder)
    device = choose_device(settings.device, needs_kernels=False)
    card = describe_card(device, settings.max_cuda_vram)
    choice = choose_engine(
        card,
        torch_arch_list=tuple(torch.cuda.get_arch_list()),
        vllm_version=find_vllm(),
        asked=settings.engine,
    )
    report = _log.warning if choice.is_fallback else _log.info
    report("engine_chosen", engine=choice.engine, asked=settings.engine, why=choice.reason)
    if not choice.uses_card:
        device = torch.device("cpu")
        card = describe_card(device)
    dtype = choice.dtype if settings.dtype == "auto" else settings.dtype
    budget_bytes = read_budget(settings.gpu_memory, device, settings.max_cuda_vram)

    def lower(engine: EngineName) -> LmSettings:
        if budget_bytes is None:
            return settings
        return fit(settings, read_size(folder, outline), budget_bytes, engine=engine, dtype=dtype, card=card)

    engine, lowered = None, lower(choice.engine)
    grammar = Grammar(outline.tokenizer, max_duration_s=lowered.max_duration_s)
    if choice.engine == "vllm":
        share = 0.0 if budget_bytes is None else budget_bytes / memory_bytes(device)
        try:
            engine = await _start_vllm(lowered, folder, outline, grammar, device=device, dtype=dtype, share=share)
        except Exception as error:  # whatever keeps vLLM from starting, PyTorch can plan
            _log.warning("vllm_did_not_start", engine="torch", why=str(error) or type(error).__name__)
            lowered = lower("torch")
            grammar = Grammar(outline.tokenizer, max_duration_s=lowered.max_duration_s)
    settings = lowered
    if engine is None:
        # Not before: beside vLLM's process, this one has nothing on the card.
        pin_budget(budget_bytes, device)
        with loading(_REMEDIES):
            checkpoint = await worker.run(
                load_checkpoint, folder, device=device, dtype=getattr(torch, dtype), outline=outline, packed=True
            )
            writer = TorchWriter(checkpoint, worker, grammar, kv_cache_gb=settings.kv_cache_gb)
        engine = _Engine(
            writer=writer,
            max_tokens=outline.config.max_position_embeddings,
            judge=TorchJudge(
                checkpoint, worker, max_tokens=None if budget_bytes is None else song_tokens(settings.max_duration_s)
            ),
            close=worker.close,
        )
    fingerprint = hashed()
    composer = Composer(
        engine.writer,
        outline.tokenizer,
        fingerprint=fingerprint,
        max_duration_s=settings.max_duration_s,
        max_tokens=engine.max_tokens,
        judge=engine.judge,
    )
    model = StageModel(
        name=Path(settings.model).name, variant=outline.variant, model_fingerprint=fingerprint, dtype=dtype
    )
    return Loaded(
        composer=composer, settings=settings, model=model, device=str(device), close=engine.close, lost=engine.lost
    )


async def _start_vllm(
    settings: LmSettings,
    folder: Path,
    outline: Outline,
    grammar: Grammar,
    *,
    device: torch.device,
    dtype: DtypeChoice,
    share: float,
) -> _Engine:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Imported late: machines without vLLM never need it.
    from soundstage_lm.vllm_engine.start import VllmOptions, start_writer

    options = VllmOptions(
        folder=folder,
        device="cpu" if device.type == "cpu" else str(device.index or 0),
        dtype=dtype,
        max_duration_s=settings.max_duration_s,
        max_texts=settings.max_in_flight,
        kv_cache_bytes=int(settings.kv_cache_gb * 1e9),
        memory_share=share,
        timeout_s=settings.engine_timeout_s,
    )
    writer = await start_writer(options, outline.tokenizer, grammar)
    return _Engine(writer=writer, max_tokens=writer.max_tokens, close=writer.close, lost=writer.died)
