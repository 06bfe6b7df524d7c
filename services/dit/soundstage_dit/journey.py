"""A song on its way from noise to latents: what it wants next, what it holds, and what its caller is told."""

import asyncio
import contextvars
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog
from torch import Tensor

from soundstage_device.shortage import is_out_of_memory
from soundstage_device.worker import DeviceMemoryError
from soundstage_dit.model.adapter import Adaptation
from soundstage_dit.scheduler import Load, Queued, count_tokens, total_tokens
from soundstage_dit.song import Song
from soundstage_dit.trajectory import Evaluation, Trajectory
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import ServiceError

_log = structlog.get_logger()

Event = Queued | int | Tensor | ServiceError  # where a song waits, its steps done, its latents, why it failed


class DenoiseError(ServiceError):
    """A song failed, its step did, or its result is not finite; the songs of other steps are not touched."""

    reason = "DENOISE_FAILED"


@dataclass(slots=True, kw_only=True, eq=False)
class Journey:
    """A song on its way; `used` is what its steps were charged, from that of the least used when it began."""

    song: Song
    model: LoadedModel
    size_bytes: int
    parts: Mapping[int, int]  # of the model, in bytes each
    adaptations: Sequence[Adaptation] = ()
    used: int = 0
    position: int | None = None  # among those that wait
    trajectory: Trajectory | None = None  # None before it is prepared, and once it has left
    wanted: Evaluation | None = None
    latents: Tensor | None = None  # [frames, channels], float32, at the end
    failure: ServiceError | None = None
    # At most two a place in the queue, one an evaluation, and one at the end: so it is bounded.
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue[Event])
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # of the call, for its logs

    @property
    def tokens(self) -> int:
        """What its next evaluation takes."""
        return sum(count_tokens(len(query.latents)) for query in self.wanted.queries) if self.wanted else 0

    @property
    def load(self) -> Load:
        """What it still asks of the device."""
        share_done = self.wanted.steps_done / self.song.diffusion.steps if self.wanted else 0.0
        tokens_left = total_tokens(self.song) * (1 - share_done)
        return Load(tokens_left=tokens_left, size_bytes=self.size_bytes, parts=self.parts)

    def advance(self, move: Callable[[], Evaluation]) -> None:
        """Move on to what is wanted next, to the latents, or to a failure that is this song's alone."""
        try:
            self.wanted = move()
        except StopIteration as end:
            self.wanted, self.latents = None, end.value
        except ServiceError as error:
            self.failure = error
        except Exception as error:
            if is_out_of_memory(error):
                self.context.run(_log.warning, "song_ran_out_of_memory")
                self.failure = DeviceMemoryError(
                    "the device has no memory left for this song just now; a shorter one needs less", retry_after_s=1.0
                )
            else:
                self.context.run(_log.exception, "song_failed")
                self.failure = DenoiseError(f"the song failed between steps: {type(error).__name__}")

    def tell(self) -> bool:
        """Tell the caller what has come of the latest step; returns whether it was the last."""
        if self.failure is not None:
            self.events.put_nowait(self.failure)
            return True
        self.events.put_nowait(self.song.diffusion.steps if self.wanted is None else self.wanted.steps_done)
        if self.latents is None:
            return False
        self.events.put_nowait(self.latents)
        return True

    def drop(self) -> None:
        """Let go of all tensors."""
        if self.trajectory is not None:
            self.trajectory.close()
        self.trajectory = self.wanted = self.latents = None
        self.adaptations = ()
