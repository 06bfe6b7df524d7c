"""Steps and songs kept to what is free of the device just then: other processes take memory too, and give it back."""

import math
from collections.abc import Callable, Sequence

import structlog

from soundstage_dit.journey import Journey
from soundstage_dit.memory import tokens_that_fit
from soundstage_dit.scheduler import evaluation_tokens

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
            evaluation_tokens(song.song) <= tokens_that_fit(song.model, left_bytes) for song in (*begun, newcomer)
        )

    def lower(self, batch: Sequence[Journey]) -> Sequence[Journey]:
        """Return those of a step's songs that there is memory for, at least the first."""
        largest = next((count for count in range(len(batch), 1, -1) if self._has_room(batch[:count])), 1)
        fitting = batch[:largest]
        is_low = len(fitting) < len(batch)
        if is_low and not self._is_low:
            _log.warning("memory_lowered_step", songs=len(fitting), wanted=len(batch), free_bytes=self._free_bytes)
        self._is_low = is_low
        return fitting

    def _has_room(self, batch: Sequence[Journey]) -> bool:
        tokens = sum(journey.tokens for journey in batch)
        return tokens <= tokens_that_fit(batch[0].model, self._free_bytes - sum(map(_joined_bytes, batch)))


def _joined_bytes(journey: Journey) -> int:
    """Return what a layer's conditions take that are laid beside those of other songs for a step."""
    queries = journey.wanted.queries if journey.wanted else ()
    return sum(query.conditions.memory[0].nbytes for query in queries)
