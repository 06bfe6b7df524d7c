"""From the wire to a Song: every field checked, every default filled in."""

import math
from typing import Final

from soundstage.stage.v1.dit_service_pb2 import DenoiseSetup
from soundstage.type.v1.options_pb2 import (
    GUIDANCE_METHOD_ADG,
    GUIDANCE_METHOD_ADG_NORMED,
    GUIDANCE_METHOD_ADG_UNCLIPPED,
    SAMPLER_HEUN,
    SAMPLER_SDE,
)
from soundstage_dit.architecture import is_base, is_stems, is_turbo
from soundstage_dit.diffusion_request import read_diffusion
from soundstage_dit.song import Song
from soundstage_dit.task_request import read_task
from soundstage_runtime.score import LATENTS_PER_CODE, MAX_LATENT_FRAMES, MAX_REFERENCES
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, MAX_STEPS, Checks

MAX_TURBO_STEPS: Final = 20


def read_song(setup: DenoiseSetup, *, variant: str, max_frames: int = MAX_LATENT_FRAMES) -> Song:
    """Read what a setup asks of a model's variant, all but the latents that follow it.

    Raises InvalidRequestError naming every bad field.
    """
    checks = Checks()
    checks.text("caption", setup.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", setup.lyrics, max_chars=MAX_LYRICS_CHARS)
    metadata = checks.metadata(setup.metadata)
    checks.codes("codes", setup.codes)
    checks.number("latent_frames", setup.latent_frames, 1, max_frames)
    checks.number("reference_count", setup.reference_count, 0, MAX_REFERENCES)
    checks.diffusion(setup.options, field="options", max_steps=MAX_TURBO_STEPS if is_turbo(variant) else MAX_STEPS)
    checks.task(setup.task, field="task")
    _check_variant(checks, setup, variant)
    _check_source(checks, setup)
    _check_edit(checks, setup)
    checks.adapters(setup.adapters, field="adapters")
    checks.finish()
    return Song(
        caption=setup.caption,
        lyrics=setup.lyrics,
        num_frames=setup.latent_frames,
        seed=setup.seed,
        diffusion=read_diffusion(setup.options, variant=variant),
        bpm=metadata.bpm if metadata.HasField("bpm") else None,
        key_scale=metadata.key_scale if metadata.HasField("key_scale") else None,
        time_signature=metadata.time_signature if metadata.HasField("time_signature") else None,
        language=metadata.vocal_language if metadata.HasField("vocal_language") else "unknown",
        duration_s=metadata.duration_s if metadata.HasField("duration_s") else None,
        codes=tuple(setup.codes[: math.ceil(setup.latent_frames / LATENTS_PER_CODE)]),
        task=read_task(setup.task, num_frames=setup.latent_frames),
        adapters=tuple((use.name, use.scale if use.HasField("scale") else 1.0) for use in setup.adapters),
    )


def _check_variant(checks: Checks, setup: DenoiseSetup, variant: str) -> None:
    kind = setup.task.WhichOneof("kind")
    if kind in ("extract", "lego", "complete") and not is_base(variant) and not (kind == "lego" and is_stems(variant)):
        able = "base, xl-base and sft-stems" if kind == "lego" else "base and xl-base"
        checks.refuse(f"task.{kind}", f"is for models of the variants {able}; this one is {variant}")
    if setup.task.lego.global_caption and not is_stems(variant):
        checks.refuse("task.lego.global_caption", f"is for models of the variant sft-stems; this one is {variant}")
    scale = setup.options.guidance.scale
    if is_turbo(variant) and scale > 1:
        checks.refuse(
            "options.guidance.scale",
            f"is {scale:g}; a {variant} model has its guidance built in: leave it out, or ask a base or sft model",
        )


def _check_source(checks: Checks, setup: DenoiseSetup) -> None:
    kind = setup.task.WhichOneof("kind")
    if kind is None and setup.source_frames:
        checks.refuse("source_frames", f"is {setup.source_frames}; must be 0 without a task, which would use it")
    elif setup.source_frames not in (0, setup.latent_frames):
        checks.refuse("source_frames", f"is {setup.source_frames}; must be latent_frames, {setup.latent_frames}, or 0")
    if setup.codes and kind not in (None, "cover"):
        checks.refuse("codes", f"has {len(setup.codes)} codes; task {kind} takes none: only cover does, or no task")


def _check_edit(checks: Checks, setup: DenoiseSetup) -> None:
    """Keep out what an edit cannot do: it walks between two velocities, in plain steps."""
    if not setup.task.HasField("edit"):
        return
    options = setup.options
    if options.sampler in (SAMPLER_HEUN, SAMPLER_SDE):
        checks.refuse("options.sampler", "must be SAMPLER_EULER for an edit")
    if options.guidance.method in (GUIDANCE_METHOD_ADG, GUIDANCE_METHOD_ADG_NORMED, GUIDANCE_METHOD_ADG_UNCLIPPED):
        checks.refuse("options.guidance.method", "must be GUIDANCE_METHOD_APG or GUIDANCE_METHOD_CFG for an edit")
    if options.HasField("wavelet_correction"):
        checks.refuse("options.wavelet_correction", "is given; an edit takes none")
