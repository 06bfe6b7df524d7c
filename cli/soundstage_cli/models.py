"""Which checkpoints the stages load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HUB: Final = "ACE-Step/Ace-Step1.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What each stage loads: directories or hub ids."""

    lm: str
    dit: str
    vae: str


def find_models(folder: Path | None) -> Models:
    """Find the stages' models in a directory laid out as the hub is; None stands for the hub itself."""
    if folder is None:
        return Models(lm=f"{_HUB}/acestep-5Hz-lm-1.7B", dit=f"{_HUB}/acestep-v15-turbo", vae=f"{_HUB}/vae")
    planners = sorted(folder.glob("acestep-5Hz-lm-*"))
    return Models(
        lm=str(planners[0] if planners else folder / "acestep-5Hz-lm-1.7B"),
        dit=str(folder / "acestep-v15-turbo"),
        vae=str(folder / "vae"),
    )
