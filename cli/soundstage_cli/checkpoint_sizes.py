"""`python -m soundstage_cli.checkpoint_sizes LM DIT VAE`: print how large checkpoints are, in JSON.

The stages read their own, which takes torch: hence a process of its own.
"""

import json
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from soundstage_budget.models import DitModel, LmModel, TransformerShape, VaeModel
from soundstage_budget.single_card import Checkpoints
from soundstage_cli.models import Models, ModelsError


def read_sizes(models: Models) -> Checkpoints:
    """Return the sizes of checkpoints; raises ModelsError with what their reader said."""
    command = [sys.executable, "-m", "soundstage_cli.checkpoint_sizes", models.lm, models.dit, models.vae]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelsError(done.stderr.strip().rpartition("\n")[2])
    read: dict[str, dict[str, Any]] = json.loads(done.stdout)
    for name in ("lm", "dit"):
        read[name]["shape"] = TransformerShape(**read[name]["shape"])
    return Checkpoints(lm=LmModel(**read["lm"]), dit=DitModel(**read["dit"]), vae=VaeModel(**read["vae"]))


def main(lm: str, dit: str, vae: str) -> None:
    """Print the sizes; exits with what is wrong with a checkpoint."""
    from soundstage_dit import size as dit_size
    from soundstage_dit.weights import text_encoder_beside
    from soundstage_lm import size as lm_size
    from soundstage_lm.weights import load_outline
    from soundstage_runtime.checkpoint import CheckpointError, locate
    from soundstage_vae import size as vae_size

    try:
        planner, beside = locate(lm), text_encoder_beside(dit)
        sizes = Checkpoints(
            lm=lm_size.read_size(planner, load_outline(planner)),
            dit=dit_size.read_size(locate(dit), locate(beside) if beside else None),
            vae=vae_size.read_size(locate(vae)),
        )
    except CheckpointError as error:
        sys.exit(str(error))
    print(json.dumps(asdict(sizes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
