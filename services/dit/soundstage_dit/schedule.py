"""The times of a song's steps: they fall from at most 1, noise, and end in 0, the data."""

from collections.abc import Sequence
from typing import Final


def schedule(steps: int, shift: float) -> list[float]:
    """Return the times of a song, from 1 to 0: one a step and the end; a larger shift dwells on noise."""
    even = [1 - step / steps for step in range(steps)]
    return [shift * time / (1 + (shift - 1) * time) for time in even] + [0.0]


# Times a turbo model was trained at: eight steps with each of three shifts.
TURBO_TIMES: Final = sorted({time for shift in (1.0, 2.0, 3.0) for time in schedule(8, shift)[:-1]}, reverse=True)


def custom_times(times: Sequence[float]) -> list[float]:
    """Return times of one's own as they are, ending in 0 just once; the model is never asked at 0."""
    return [time for time in times if time > 0] + [0.0]


def nearest_turbo_times(times: Sequence[float]) -> list[float]:
    """Return times of one's own for a turbo model: each the nearest of TURBO_TIMES, and 0 at the end."""
    return [min(TURBO_TIMES, key=lambda known: abs(known - time)) for time in times if time > 0] + [0.0]
