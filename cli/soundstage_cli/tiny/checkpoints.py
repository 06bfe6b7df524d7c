"""All tiny checkpoints in one directory: `original/` laid out as the hub is, `diffusers/` with the same weights."""

import warnings
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from soundstage_cli.tiny.dit import write_diffusers, write_original
from soundstage_cli.tiny.lm import TINY, write_lm
from soundstage_cli.tiny.vae import write_vae
from soundstage_runtime.score import NUM_CODES


def write_tiny(folder: Path) -> list[Path]:
    """Write the tiny language model, DiTs (2B-like, turbo and base, and XL-like) and VAE; return the folders made."""
    logging.disable_progress_bar()
    # The released VAE is weight-normed in torch's older way, and so are we.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.nn.utils.weight_norm")
    original = folder / "original"
    # All the codes that the diffusion model has, or the planner could not be told what a sound is.
    write_lm(original / "acestep-5Hz-lm-tiny", shape=replace(TINY, num_codes=NUM_CODES))
    write_vae(original / "vae")
    write_original(original, version="base")
    made = [original]
    for is_xl in (False, True):
        write_original(original, xl=is_xl)
        pipeline = folder / "diffusers" / ("acestep-v15-xl-turbo" if is_xl else "acestep-v15-turbo")
        write_diffusers(pipeline, xl=is_xl)
        write_vae(pipeline / "vae")
        made.append(pipeline)
    return made
