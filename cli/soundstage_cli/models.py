"""Which checkpoints the stages load."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HUB: Final = "ACE-Step/Ace-Step1.5"
_PLANNER: Final = "acestep-5Hz-lm-1.7B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What each stage loads: directories or hub ids."""

    lm: str
    dit: str
    vae: str


class ModelsError(Exception):
    """A directory of models lacks one; the message says which."""


def find_models(folder: Path | None) -> Models:
    """Find the stages' models in a directory laid out as the hub is; None stands for the hub itself.

    Raises ModelsError naming what is missing.
    """
    if folder is None:
        return Models(lm=f"{_HUB}/{_PLANNER}", dit=f"{_HUB}/acestep-v15-turbo", vae=f"{_HUB}/vae")
    planners = [folder / _PLANNER, *sorted(folder.glob("acestep-5Hz-lm-*"))]
    found = Models(
        lm=str(next((planner for planner in planners if planner.is_dir()), planners[0])),
        dit=str(folder / "acestep-v15-turbo"),
        vae=str(folder / "vae"),
    )
    missing = [path for path in (found.lm, found.dit, found.vae) if not Path(path).is_dir()]
    if missing:
        raise ModelsError(
            f"{folder} is not laid out as the hub is: no {', no '.join(missing)} "
            "(`soundstage models tiny DIR` makes such a layout in DIR/original)"
        )
    return found
