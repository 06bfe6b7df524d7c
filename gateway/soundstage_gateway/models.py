"""Which models make a song: asked of the stages before anything is begun."""

import asyncio
from collections.abc import Sequence

from soundstage.music.v1.song_service_pb2 import STAGE_DIT, STAGE_LM, STAGE_VAE, Stage
from soundstage.stage.v1.dit_service_pb2 import ListAdaptersRequest
from soundstage.stage.v1.stage_service_pb2 import StageModel
from soundstage_gateway.order import MODELS, Order
from soundstage_gateway.stages import Stages, ask_once
from soundstage_runtime.validation import Checks
from soundstage_runtime.variant import check_for_variant


async def choose_models(stages: Stages, order: Order) -> dict[Stage.ValueType, str]:
    """Return the fingerprint of each stage's model; raises ServiceError for what they cannot do."""
    needed = (STAGE_LM, STAGE_DIT, STAGE_VAE) if order.is_planned else (STAGE_DIT, STAGE_VAE)
    found = dict(zip(needed, await asyncio.gather(*map(stages.describe, needed)), strict=True))
    checks = Checks()
    _check_length(checks, order, max_duration_s=min(stage.max_duration_s for stage in found.values()))
    cards = {stage: description.models[0] for stage, description in found.items()}
    if chosen := _choose_model(checks, order.model, found[STAGE_DIT].models):
        cards[STAGE_DIT] = chosen
        check_for_variant(checks, chosen.variant, task=order.task, options=order.diffusion, field="diffusion")
    fingerprints = {stage: card.model_fingerprint for stage, card in cards.items()}
    if order.adapters:
        answer = await ask_once(STAGE_DIT, stages.dit.ListAdapters, ListAdaptersRequest())
        model = fingerprints[STAGE_DIT]
        loaded = {adapter.name for adapter in answer.adapters if adapter.model_fingerprint in ("", model)}
        for index, use in enumerate(order.adapters):
            if use.name not in loaded:
                known = ", ".join(sorted(loaded)) or "none is loaded"
                checks.refuse(
                    f"adapters[{index}].name",
                    f"is {use.name[:64]!r}; must be an adapter that is loaded for the model: {known}",
                )
    checks.finish()
    return fingerprints


def _choose_model(checks: Checks, wanted: str, models: Sequence[StageModel]) -> StageModel | None:
    """Return the model that is called `wanted`, by its name or its variant, or the first where none is."""
    for model in models:
        if wanted in ("", f"{MODELS}{model.name}", model.variant):
            return model
    known = ", ".join(f"{MODELS}{model.name} ({model.variant})" for model in models)
    checks.refuse("model", f"is {wanted[:80]!r}; must be one of {known}")
    return None


def _check_length(checks: Checks, order: Order, *, max_duration_s: float) -> None:
    """Refuse a song that is longer than the stages make."""
    if order.source is None:
        checks.metadata(order.metadata, max_duration_s=max_duration_s)
    elif order.source.duration_s > max_duration_s:
        checks.refuse("source", f"makes a song of {order.source.duration_s:g} s; at most {max_duration_s:g} s are made")
