"""From the wire to a Song: every field checked, every default filled in."""

import math

from soundstage.stage.v1.dit_service_pb2 import DenoiseSetup
from soundstage_dit.diffusion_request import read_diffusion
from soundstage_dit.song import Song
from soundstage_dit.task_request import read_task
from soundstage_runtime.score import LATENTS_PER_CODE, MAX_LATENT_FRAMES, MAX_REFERENCES
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks
from soundstage_runtime.variant import check_for_variant


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
    checks.task(setup.task, field="task")
    check_for_variant(checks, variant, task=setup.task, options=setup.options, field="options")
    _check_source(checks, setup)
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


def _check_source(checks: Checks, setup: DenoiseSetup) -> None:
    kind = setup.task.WhichOneof("kind")
    if kind is None and setup.source_frames:
        checks.refuse("source_frames", f"is {setup.source_frames}; must be 0 without a task, which would use it")
    elif setup.source_frames not in (0, setup.latent_frames):
        checks.refuse("source_frames", f"is {setup.source_frames}; must be latent_frames, {setup.latent_frames}, or 0")
    if setup.codes and kind not in (None, "cover"):
        checks.refuse("codes", f"has {len(setup.codes)} codes; task {kind} takes none: only cover does, or no task")
