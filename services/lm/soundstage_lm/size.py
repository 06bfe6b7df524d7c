"""A planner within its memory: how large it is, and what is left for songs."""

from pathlib import Path

from soundstage_budget.cards import Card
from soundstage_budget.checkpoint_size import count_parameters, file_bytes
from soundstage_budget.engine_choice import DtypeChoice, EngineName
from soundstage_budget.models import BYTES, LmModel, TransformerShape
from soundstage_budget.need import page_bytes, row_bytes
from soundstage_budget.plan import plan_lm
from soundstage_device.budget import tell_given_up
from soundstage_lm.settings import LmSettings
from soundstage_lm.weights import Outline


def read_size(folder: Path, outline: Outline) -> LmModel:
    """Read the size of a checkpoint; raises CheckpointError."""
    config = outline.config
    return LmModel(
        variant=outline.variant,
        shape=TransformerShape(
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        ),
        vocabulary=config.vocab_size,
        num_codes=len(outline.tokenizer.code_ids),
        parameters=sum(count_parameters(folder).values()),
        file_bytes=file_bytes(folder),
    )


def fit(
    settings: LmSettings, size: LmModel, budget_bytes: int, *, engine: EngineName, dtype: DtypeChoice, card: Card
) -> LmSettings:
    """Return settings lowered to what fits a budget; raises DoesNotFitError when not even a short song does."""
    plan = plan_lm(
        [size],
        card,
        budget_bytes=budget_bytes,
        dtype=dtype,
        engine=engine,
        max_batch=settings.asked("max_in_flight"),
        max_duration_s=settings.asked("max_duration_s"),
    )
    tell_given_up(plan.given_up)
    row = row_bytes(size.shape, duration_s=plan.max_duration_s, itemsize=BYTES[dtype])
    own = page_bytes(size.shape, BYTES[dtype]) if engine == "vllm" else 0
    planned_gb = (2 * plan.max_batch * row + own) / 1e9
    lowered = {
        "max_in_flight": plan.max_batch,
        "max_duration_s": plan.max_duration_s,
        "kv_cache_gb": min(settings.asked("kv_cache_gb") or planned_gb, planned_gb),
    }
    return settings.model_copy(update=lowered)
