"""Steps and songs kept to what is free of the device just then: other processes take memory too, and give it back."""

import math
from collections.abc import Callable, Sequence

import structlog

from soundstage_dit.journey import Journey
from soundstage_dit.memory import tokens_that_fit
from soundstage_dit.scheduler import step_tokens, take_turn

_log = structlog.get_logger()


class Guard:
    """Goes by `free_bytes` as it was when the worker last laid something down, which is just before the next step."""

    def __init__(self, free_bytes: Callable[[], float]) -> None:
        self._read_free_bytes = free_bytes
        self._free_bytes = math.inf
        self._is_low = False

    def look(self) -> None:
        """Read what is free; for the thread that runs the models."""
        self._free_bytes = self._read_free_bytes()

    def lets_begin(self, newcomer: Journey, begun: Sequence[Journey]) -> bool:
        """Say whether there is memory for one more song, and beside it for a step of any; a song alone is tried."""
        left_bytes = self._free_bytes - newcomer.size_bytes
        return not begun or all(
            step_tokens(song.song) <= tokens_that_fit(song.model, left_bytes) for song in (*begun, newcomer)
        )

    def lower(self, batch: Sequence[Journey]) -> Sequence[Journey]:
        """Return those of a step's songs that there is memory for, at least the first."""
        if len(batch) == 1:
            return batch
        max_tokens = tokens_that_fit(batch[0].model, self._free_bytes)
        fitting = take_turn(batch, max_songs=len(batch), max_tokens=max_tokens)
        is_low = len(fitting) < len(batch)
        if is_low and not self._is_low:
            _log.warning("memory_lowered_step", songs=len(fitting), wanted=len(batch), free_bytes=self._free_bytes)
        self._is_low = is_low
        return fitting
