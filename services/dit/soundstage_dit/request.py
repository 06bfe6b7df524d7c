"""From the wire to a Song: every field checked, every default filled in."""

import math
from typing import Final

from soundstage.stage.v1.dit_service_pb2 import DenoiseSetup
from soundstage_dit.sampler import schedule
from soundstage_dit.song import Diffusion, Song
from soundstage_runtime.score import LATENTS_PER_CODE, MAX_LATENT_FRAMES
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks

DEFAULT_STEPS: Final = 8
DEFAULT_SHIFT: Final = 3.0


def read_song(setup: DenoiseSetup) -> Song:
    """Read a setup; raises InvalidRequestError naming every bad field."""
    checks = Checks()
    checks.text("caption", setup.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", setup.lyrics, max_chars=MAX_LYRICS_CHARS)
    metadata = checks.metadata(setup.metadata)
    checks.codes("codes", setup.codes)
    checks.number("latent_frames", setup.latent_frames, 1, MAX_LATENT_FRAMES)
    checks.diffusion(setup.options, field="options")
    checks.finish()
    options = setup.options
    steps = options.steps if options.HasField("steps") else DEFAULT_STEPS
    shift = options.shift if options.HasField("shift") else DEFAULT_SHIFT
    return Song(
        caption=setup.caption,
        lyrics=setup.lyrics,
        num_frames=setup.latent_frames,
        seed=setup.seed,
        diffusion=Diffusion(times=tuple(schedule(steps, shift))),
        bpm=metadata.bpm if metadata.HasField("bpm") else None,
        key_scale=metadata.key_scale if metadata.HasField("key_scale") else None,
        time_signature=metadata.time_signature if metadata.HasField("time_signature") else None,
        language=metadata.vocal_language if metadata.HasField("vocal_language") else "unknown",
        duration_s=metadata.duration_s if metadata.HasField("duration_s") else None,
        codes=tuple(setup.codes[: math.ceil(setup.latent_frames / LATENTS_PER_CODE)]),
    )
