"""Request streams, checked: the setup first and only first, then runs that leave no gap."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from soundstage.type.v1.tensor_pb2 import LatentChunk
from soundstage_runtime.errors import InvalidRequestError, ServiceError, Violation
from soundstage_runtime.score import LATENT_CHANNELS
from soundstage_runtime.tensors import from_proto


class Request(Protocol):
    """A message of a stream: its oneof `part` is the setup or a run."""

    def WhichOneof(self, oneof_group: Literal["part"], /) -> str | None:  # noqa: N802  protobuf's own name
        """Name what this message carries; None for nothing."""
        ...


class LatentRequest(Request, Protocol):
    """A message of a stream of latents."""

    @property
    def latents(self) -> LatentChunk:
        """A run of latents."""
        ...


R = TypeVar("R", bound=Request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Announced:
    """Latents that a setup announced: the part that carries them, their length, and the field that says so."""

    name: str
    num_frames: int
    length_field: str


M = TypeVar("M")


class CallerStalledError(ServiceError):
    """The caller keeps its stream open and sends nothing."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    reason = "CALLER_STALLED"


async def patient(requests: AsyncIterator[M], *, timeout_s: float) -> AsyncGenerator[M]:
    """Pass requests on; raises CallerStalledError when one takes longer than `timeout_s` to come."""
    while True:
        try:
            async with asyncio.timeout(timeout_s):
                request = await anext(requests, None)
        except TimeoutError as error:
            raise CallerStalledError(f"no request came for {timeout_s:g} s") from error
        if request is None:
            return
        yield request


async def read_first(requests: AsyncIterator[R]) -> R:
    """Await the first message, which must carry the setup; raises InvalidRequestError."""
    request = await anext(requests, None)
    part = request.WhichOneof("part") if request is not None else None
    if request is None or part != "setup":
        found = "there is no message" if request is None else f"the first message carries {part or 'nothing'}"
        raise _invalid("setup", f"is missing: {found}; the first message must carry it")
    return request


async def read_latents(requests: AsyncIterator[LatentRequest], num_frames: int) -> AsyncGenerator[NDArray[np.float32]]:
    """Yield runs of latents [frames, 64], `num_frames` in all, as the setup promised; raises InvalidRequestError."""
    place = Place("latents", "setup.latent_frames", num_frames)
    async for request in requests:
        place.check_part(request)
        yield _read_run(place, request.latents)
    place.check_end()


async def read_parts(requests: AsyncIterator[R], announced: Sequence[Announced]) -> list[NDArray[np.float32]]:
    """Read latents [frames, 64], one part after another, to the end of the stream; raises InvalidRequestError."""
    num_messages = 1
    parts: list[NDArray[np.float32]] = []
    for part in announced:
        place = Place(part.name, part.length_field, part.num_frames, num_messages=num_messages)
        runs = [np.empty((0, LATENT_CHANNELS), np.float32)]
        while not place.is_at_end and (request := await anext(requests, None)) is not None:
            place.check_part(request)
            runs.append(_read_run(place, getattr(request, part.name)))
        place.check_end()
        num_messages = place.num_messages
        parts.append(np.concatenate(runs))
    if (request := await anext(requests, None)) is not None:
        found = request.WhichOneof("part")
        what = f"carries {found or 'nothing'}, after all that the setup announced"
        raise _invalid(found or "part", f"is one too many: message {num_messages + 1} {what}")
    return parts


class Place:
    """How far a stream of runs has come on its way to the length that its setup promised."""

    def __init__(self, part: str, length_field: str, length: int, *, num_messages: int = 1) -> None:
        """Begin after `num_messages`."""
        self.part, self.num_messages = part, num_messages
        self._length_field, self._length = length_field, length
        self._next = 0

    @property
    def is_at_end(self) -> bool:
        """Whether all of it has come."""
        return self._next == self._length

    def check_part(self, request: Request) -> None:
        """Refuse a message that carries something else than a run."""
        found = request.WhichOneof("part")
        self.num_messages += 1
        if found == self.part:
            return
        if found is None:
            what = "nothing; every later one carries it"
        elif found == "setup":
            what = "setup, which only the first message may; every later one carries it"
        else:
            what = f"{found} after {self._next} frames; {self._length_field} is {self._length}"
        raise _invalid(self.part, f"is missing: message {self.num_messages} carries {what}")

    def check_start(self, first_frame: int) -> list[Violation]:
        """Say what is wrong with where a run begins."""
        if first_frame == self._next:
            return []
        description = f"is {first_frame}; must be {self._next}, where the last chunk ended"
        return [Violation(field=f"{self.part}.first_frame", description=description)]

    def advance(self, num_frames: int, violations: Sequence[Violation]) -> None:
        """Go on behind a run; raises InvalidRequestError for its `violations`, or when it reaches too far."""
        if violations:
            raise InvalidRequestError(violations)
        self._next += num_frames
        if self._next > self._length:
            raise _invalid(self.part, f"reaches frame {self._next}; {self._length_field} is {self._length}")

    def check_end(self) -> None:
        """Refuse a stream that ended early."""
        if self._next < self._length:
            raise _invalid(self.part, f"ended after frame {self._next}; {self._length_field} is {self._length}")


def _read_run(place: Place, chunk: LatentChunk) -> NDArray[np.float32]:
    violations = place.check_start(chunk.first_frame)
    try:
        latents = from_proto(chunk.tensor, f"{place.part}.tensor", shape=(None, LATENT_CHANNELS))
    except InvalidRequestError as error:
        raise InvalidRequestError([*violations, *error.violations]) from error
    place.advance(len(latents), violations)
    return latents


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError([Violation(field=field, description=description)])
