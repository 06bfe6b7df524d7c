"""What can be asked of a variant of the diffusion model: by the gateway's public request, and by a stage's own."""

from typing import Final

from soundstage.type.v1.options_pb2 import (
    GUIDANCE_METHOD_ADG,
    GUIDANCE_METHOD_ADG_NORMED,
    GUIDANCE_METHOD_ADG_UNCLIPPED,
    SAMPLER_HEUN,
    SAMPLER_SDE,
    DiffusionOptions,
)
from soundstage.type.v1.task_pb2 import Task
from soundstage_runtime.validation import MAX_STEPS, Checks

MAX_TURBO_STEPS: Final = 20
_TRACK_TASKS: Final = ("extract", "lego", "complete")


def is_turbo(variant: str) -> bool:
    """Say whether a variant has guidance built in."""
    return variant.endswith("turbo")


def is_base(variant: str) -> bool:
    """Say whether a variant knows the tracks of a mix."""
    return variant.endswith("base")


def is_stems(variant: str) -> bool:
    """Say whether a variant was trained to add tracks to a mix that is described beside them."""
    return variant.endswith("stems")


def can_do(variant: str, kind: str) -> bool:
    """Say whether a variant can do a task of this kind: "cover"."""
    return kind not in _TRACK_TASKS or is_base(variant) or (kind == "lego" and is_stems(variant))


def check_for_variant(checks: Checks, variant: str, *, task: Task, options: DiffusionOptions, field: str) -> None:
    """Check diffusion options, which `field` names, and refuse what the variant or the task cannot do."""
    checks.diffusion(options, field=field, max_steps=MAX_TURBO_STEPS if is_turbo(variant) else MAX_STEPS)
    _check_task(checks, variant, task)
    scale = options.guidance.scale
    if is_turbo(variant) and scale > 1:
        checks.refuse(
            f"{field}.guidance.scale",
            f"is {scale:g}; a {variant} model has its guidance built in: leave it out, or ask a base or sft model",
        )
    if task.HasField("edit"):
        _check_edit(checks, options, field)


def _check_task(checks: Checks, variant: str, task: Task) -> None:
    kind = task.WhichOneof("kind")
    if kind and not can_do(variant, kind):
        able = "base, xl-base and sft-stems" if kind == "lego" else "base and xl-base"
        checks.refuse(f"task.{kind}", f"is for models of the variants {able}; this one is {variant}")
    if task.lego.global_caption and not is_stems(variant):
        checks.refuse("task.lego.global_caption", f"is for models of the variant sft-stems; this one is {variant}")


def _check_edit(checks: Checks, options: DiffusionOptions, field: str) -> None:
    """Keep out what an edit cannot do: it walks between two velocities, in plain steps."""
    if options.sampler in (SAMPLER_HEUN, SAMPLER_SDE):
        checks.refuse(f"{field}.sampler", "must be SAMPLER_EULER for an edit")
    if options.guidance.method in (GUIDANCE_METHOD_ADG, GUIDANCE_METHOD_ADG_NORMED, GUIDANCE_METHOD_ADG_UNCLIPPED):
        checks.refuse(f"{field}.guidance.method", "must be GUIDANCE_METHOD_APG or GUIDANCE_METHOD_CFG for an edit")
    if options.HasField("wavelet_correction"):
        checks.refuse(f"{field}.wavelet_correction", "is given; an edit takes none")
