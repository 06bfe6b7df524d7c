"""Diffusion models within their memory: how large they are, and what is left for songs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from soundstage_budget.cards import Card
from soundstage_budget.checkpoint_size import count_parameters, file_bytes
from soundstage_budget.models import DitModel, TransformerShape
from soundstage_budget.need import KEPT_BYTES
from soundstage_budget.plan import plan_dit
from soundstage_device.budget import tell_given_up
from soundstage_dit.model.shape import StackShape
from soundstage_dit.settings import DitSettings
from soundstage_dit.weights import find_parts, is_diffusers, read_architecture


def read_size(folder: Path, text_encoder: Path | None) -> DitModel:
    """Read the size of a checkpoint; raises CheckpointError."""
    architecture = read_architecture(folder)
    texts, *parts = find_parts(folder, text_encoder)
    if is_diffusers(folder):
        counts = [sum(count_parameters(part).values()) for part in parts]
    else:
        tensors = count_parameters(folder)
        groups = ("decoder.", "encoder.", "tokenizer.", "detokenizer.")
        counts = [sum(tensors[name] for name in tensors if name.startswith(group)) for group in groups]
    transformer, conditions, *codes = counts
    return DitModel(
        variant=architecture.variant,
        shape=transformer_shape(architecture.dit.stack),
        parameters=transformer,
        beside=(sum(count_parameters(texts).values()), conditions, *codes),
        largest_piece=max(codes),
        is_guided=not architecture.variant.endswith("turbo"),
        file_bytes=sum(map(file_bytes, (texts, *parts))),
    )


def transformer_shape(stack: StackShape) -> TransformerShape:
    """Return a stack's dimensions as a plan of memory has them."""
    return TransformerShape(
        width=stack.width,
        mlp_width=stack.mlp_width,
        layers=len(stack.windows),
        heads=stack.heads,
        kv_heads=stack.kv_heads,
        head_dim=stack.head_dim,
    )


def fit(
    settings: DitSettings,
    sizes: Sequence[DitModel],
    budget_bytes: int,
    *,
    dtype: str,
    card: Card,
    has_torchao: bool = True,
) -> DitSettings:
    """Return settings lowered to what fits a budget; raises DoesNotFitError when not even a short song does.

    Of several models, a card holds those that are in use, at least the largest; a CPU holds all.
    """
    is_alone, on_card = len(sizes) == 1, card.capability is not None
    largest, *others = sorted(sizes, key=lambda size: size.parameters, reverse=True)
    needed = replace(largest, is_guided=any(size.is_guided for size in sizes))
    if not on_card:
        elsewhere = [parameters for other in others for parameters in (other.parameters, *other.beside)]
        needed = replace(needed, beside=(*needed.beside, *elsewhere))
    stays = not on_card or not is_alone or settings.max_models_gb is not None
    plan = plan_dit(
        [needed],
        card,
        budget_bytes=budget_bytes,
        dtype=dtype,
        quantization=settings.quantization,
        offload="none" if stays else settings.offload,
        has_torchao=has_torchao,
        max_batch=settings.asked("max_in_flight"),
        max_duration_s=settings.asked("max_duration_s"),
        max_tokens=settings.max_tokens,
    )
    tell_given_up(plan.given_up)
    left_gb = (budget_bytes - plan.need.total) / 1e9
    adapters_gb = min(settings.max_adapters_gb, left_gb if is_alone else left_gb / 2)
    models_gb = settings.max_models_gb
    if on_card and not is_alone:
        models_gb = min(models_gb or math.inf, plan.need.weights / 1e9 + left_gb - adapters_gb)
    lowered = {
        "offload": plan.offload,
        "quantization": plan.quantization,
        "max_duration_s": plan.max_duration_s,
        "max_in_flight": plan.max_batch,
        "max_batch": min(settings.max_batch, plan.max_batch),
        "max_tokens": plan.max_tokens,
        "max_songs_gb": min(settings.max_songs_gb, plan.need.kv / 1e9),
        "max_kept_gb": settings.max_kept_gb if on_card else min(settings.max_kept_gb, KEPT_BYTES / 1e9),
        "max_models_gb": models_gb,
        "max_adapters_gb": adapters_gb,
    }
    return settings.model_copy(update=lowered)
