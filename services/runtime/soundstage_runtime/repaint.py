"""What a repaint keeps: the diffusion stage and the gateway's splice go by the same share."""

from typing import Final

from soundstage.type.v1.task_pb2 import REPAINT_MODE_AGGRESSIVE, REPAINT_MODE_CONSERVATIVE, Repaint

_DEFAULT_STRENGTH: Final = 0.5


def kept_share(repaint: Repaint) -> float:
    """Return how much of what lies outside of the window is kept, 0 to 1."""
    if repaint.mode == REPAINT_MODE_CONSERVATIVE:
        return 1.0
    if repaint.mode == REPAINT_MODE_AGGRESSIVE:
        return 0.0
    return 1 - (repaint.strength if repaint.HasField("strength") else _DEFAULT_STRENGTH)
