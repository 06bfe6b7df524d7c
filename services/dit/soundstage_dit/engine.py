"""Step-level batching: every step of the device serves whatever songs are in flight just then."""

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import grpc
import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundstage_dit.adapters import Adapters
from soundstage_dit.aligner import Look, align, look
from soundstage_dit.alignment import Alignment
from soundstage_dit.memory import estimate_bytes
from soundstage_dit.model.adapter import Adaptation
from soundstage_dit.scheduler import (
    Load,
    Queued,
    Room,
    charge,
    count_tokens,
    take_turn,
    tokens_until_room,
    total_tokens,
)
from soundstage_dit.song import Song
from soundstage_dit.tasks import prepare
from soundstage_dit.trajectory import Evaluation, Trajectory, trajectory
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import OverloadedError, ServiceError
from soundstage_runtime.score import LATENTS_PER_CODE, MAX_LATENT_FRAMES
from soundstage_runtime.worker import Worker

_log = structlog.get_logger()

_FRAMES_AT_ONCE: Final = 64 * LATENTS_PER_CODE  # tokenized in one step: short beside a step of diffusion
_LATEST_SHARE: Final = 0.2  # of the latest step in the time that a token is said to take


class DenoiseError(ServiceError):
    """A song failed, its step did, or its result is not finite; the songs of other steps are not touched."""

    reason = "DENOISE_FAILED"


class SongTooLargeError(ServiceError):
    """A song needs more memory than all songs together may have."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "SONG_TOO_LARGE"


class TokenizeError(ServiceError):
    """Latents led to numbers that are not finite."""

    reason = "TOKENIZE_FAILED"


_Event = Queued | int | Tensor | ServiceError  # where a song waits, its steps done, its latents, why it failed


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """A song on its way; `used` is what its steps were charged, from that of the least used when it came in."""

    song: Song
    size_bytes: int
    adaptations: Sequence[Adaptation] = ()
    used: int = 0
    position: int | None = None  # among those that wait
    trajectory: Trajectory | None = None  # None before it is prepared, and once it has left
    wanted: Evaluation | None = None
    latents: Tensor | None = None  # [frames, channels], float32, at the end
    failure: ServiceError | None = None
    # At most one a place in the queue, one an evaluation, and one at the end: so it is bounded.
    events: asyncio.Queue[_Event] = field(default_factory=asyncio.Queue[_Event])
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # of the call, for its logs

    @property
    def steps_done(self) -> int:
        return self.song.diffusion.steps if self.wanted is None else self.wanted.steps_done

    @property
    def tokens(self) -> int:
        return sum(count_tokens(len(query.latents)) for query in self.wanted.queries) if self.wanted else 0

    @property
    def load(self) -> Load:
        share_done = self.wanted.steps_done / self.song.diffusion.steps if self.wanted else 0.0
        return Load(tokens_left=total_tokens(self.song) * (1 - share_done), size_bytes=self.size_bytes)

    def advance(self, move: Callable[[], Evaluation]) -> None:
        """Move on to what is wanted next, to the latents, or to a failure that is this song's alone."""
        try:
            self.wanted = move()
        except StopIteration as end:
            self.wanted, self.latents = None, end.value
        except ServiceError as error:
            self.failure = error
        except Exception as error:
            self.context.run(_log.exception, "song_failed")
            self.failure = DenoiseError(f"the song failed between steps: {type(error).__name__}")

    def drop(self) -> None:
        """Let go of all tensors."""
        if self.trajectory is not None:
            self.trajectory.close()
        self.trajectory = self.wanted = self.latents = None
        self.adaptations = ()


class DitEngine:
    """Denoises songs, step by step.

    At most `max_songs` hold memory at once, `max_songs_gb` in all by estimate; up to `max_waiting` wait for it, first
    come first served. A step takes the songs that have had least, up to `max_batch` and to `max_tokens`, where two
    frames of one velocity are a token.
    """

    def __init__(
        self,
        model: LoadedModel,
        worker: Worker,
        *,
        adapters: Adapters | None = None,
        max_batch: int = 8,
        max_tokens: int = count_tokens(MAX_LATENT_FRAMES),
        max_songs: int = 8,
        max_songs_gb: float = 4.0,
        max_waiting: int = 64,
    ) -> None:
        self._model, self._worker = model, worker
        self._adapters = adapters or Adapters(model.dit, worker)
        self._max_batch, self._max_tokens = max_batch, max_tokens
        self._room = Room(max_songs=max_songs, max_bytes=round(max_songs_gb * 1e9))
        self._max_waiting = max_waiting
        self._waiting: deque[_Entry] = deque()
        self._held: list[_Entry] = []
        self._in_hand: Sequence[_Entry] = ()  # of the worker, which holds on to their tensors
        self._seconds_per_token = 0.0
        self._steps: asyncio.Task[None] | None = None

    @property
    def model_fingerprint(self) -> str:
        """Name the loaded model."""
        return self._model.model_fingerprint

    @property
    def num_songs(self) -> int:
        """How many songs hold memory on the device."""
        return len(self._held)

    @property
    def num_waiting(self) -> int:
        """How many songs wait for memory on the device."""
        return len(self._waiting)

    async def denoise(self, song: Song) -> AsyncGenerator[int | Queued | NDArray[np.float32]]:
        """Yield where the song waits, if it must, the number of each step done, from 1, and then the latents.

        They are [frames, channels]. Closing the generator takes the song out before the next step. Raises DenoiseError,
        SongTooLargeError, AdapterNotFoundError, and OverloadedError where too many wait.
        """
        entry = _Entry(
            song=song,
            size_bytes=estimate_bytes(song, self._model),
            adaptations=self._adapters.find(song.adapters),
        )
        self._enter(entry)
        try:
            done = 0
            while True:
                match await entry.events.get():
                    case ServiceError() as failure:
                        raise failure
                    case Queued() as queued:
                        yield queued
                    case Tensor() as latents:
                        break
                    case steps_done:
                        for step in range(done + 1, steps_done + 1):
                            yield step
                        done = steps_done
        finally:
            self._leave(entry)
        yield await self._worker.run(_read, latents)

    async def tokenize(self, latents: AsyncIterator[NDArray[np.float32]]) -> AsyncGenerator[NDArray[np.int64]]:
        """Yield the codes of latents [frames, channels] that come in runs; raises TokenizeError.

        A song is cut by its own length, not by the runs it comes in, so its codes are always the same. A closed
        generator asks for no more pieces.
        """
        held = np.empty((0, self._model.channels), np.float32)
        async for run in latents:
            held = np.concatenate([held, run])
            while len(held) >= _FRAMES_AT_ONCE:
                yield await self._worker.run(self._encode, held[:_FRAMES_AT_ONCE])
                held = held[_FRAMES_AT_ONCE:]
        if len(held):
            yield await self._worker.run(self._encode, held)

    async def align(self, song: Song, latents: NDArray[np.float32]) -> Alignment:
        """Tell when the lyrics of a song that was made are sung; raises UncalibratedError and AlignError.

        The adapters it was made with must still be loaded: raises AdapterNotFoundError.
        """
        return await align(await self._worker.run(self._look, song, self._adapters.find(song.adapters), latents))

    def close(self) -> None:
        """End the worker; waits for the step in hand."""
        self._worker.close()

    def _enter(self, entry: _Entry) -> None:
        size_gb, max_gb = entry.size_bytes / 1e9, self._room.max_bytes / 1e9
        if size_gb > max_gb:
            raise SongTooLargeError(
                f"a song of {entry.song.num_frames} latent frames with these lyrics and options needs about "
                f"{size_gb:.3g} GB, and max_songs_gb is {max_gb:.3g}; a shorter song or shorter lyrics need less"
            )
        must_wait = bool(self._waiting) or not self._room.fits([other.load for other in self._held], entry.load)
        if must_wait and self.num_waiting >= self._max_waiting:
            raise OverloadedError(
                f"{self.num_songs} songs are under way and {self.num_waiting} wait, which is as many as may",
                metadata={"max_waiting": str(self._max_waiting)},
                retry_after_s=max(1.0, self._wait_s(entry, self._waiting)),
            )
        self._waiting.append(entry)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._room.fits([other.load for other in self._held], self._waiting[0].load):
            entry = self._waiting.popleft()
            entry.used = min((other.used for other in self._held), default=0)
            self._held.append(entry)
        for position, entry in enumerate(self._waiting):
            if entry.position != position:
                entry.position = position
                before = list(self._waiting)[:position]
                entry.events.put_nowait(Queued(position=position, wait_s=self._wait_s(entry, before)))
        if self._held and self._steps is None:
            # In a context of its own: the steps belong to no single call.
            self._steps = asyncio.create_task(self._run_steps(), context=contextvars.Context())

    def _wait_s(self, entry: _Entry, before: Sequence[_Entry]) -> float:
        held, ahead = ([other.load for other in songs] for songs in (self._held, before))
        return self._seconds_per_token * tokens_until_room(self._room, held, ahead, entry.load)

    def _leave(self, entry: _Entry) -> None:
        for songs in (self._held, self._waiting):
            if entry in songs:
                songs.remove(entry)
        if entry not in self._in_hand:
            entry.drop()
        self._let_in()

    async def _run_steps(self) -> None:
        try:
            while self._held:
                for entry in [entry for entry in self._held if entry.trajectory is None]:
                    if entry in self._held:  # it may have left while another was prepared
                        await self._work([entry], self._prepare)
                if batch := take_turn(self._held, max_songs=self._max_batch, max_tokens=self._max_tokens):
                    await self._take_step(batch)
        finally:
            self._steps = None

    async def _take_step(self, batch: Sequence[_Entry]) -> None:
        tokens = sum(entry.tokens for entry in batch)
        for entry in batch:
            entry.used += charge(entry.tokens)
        start = time.perf_counter()
        await self._work(batch, self._step)
        latest = (time.perf_counter() - start) / tokens
        known = self._seconds_per_token or latest
        self._seconds_per_token = known + _LATEST_SHARE * (latest - known)

    async def _work(self, entries: Sequence[_Entry], work: Callable[[Sequence[_Entry]], None]) -> None:
        """Have the worker move songs on, and tell each of them what has come of it."""
        self._in_hand = entries
        failure = None
        try:
            await self._worker.run(work, entries)
        except Exception as error:
            _log.exception("step_failed", songs=len(entries))
            failure = DenoiseError(f"a diffusion step failed: {type(error).__name__}")
        finally:
            self._in_hand = ()
        for entry in entries:
            entry.failure = entry.failure or failure
            if entry in self._held:
                self._tell(entry)
            else:
                entry.drop()

    def _tell(self, entry: _Entry) -> None:
        if entry.failure is not None:
            entry.events.put_nowait(entry.failure)
        else:
            entry.events.put_nowait(entry.steps_done)
        if entry.latents is not None:
            entry.events.put_nowait(entry.latents)
        if entry.failure is not None or entry.latents is not None:
            self._leave(entry)

    @torch.inference_mode()
    def _prepare(self, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            entry.advance(partial(self._set_out, entry))

    def _set_out(self, entry: _Entry) -> Evaluation:
        entry.trajectory = trajectory(entry.song, prepare(entry.song, self._model, entry.adaptations))
        return next(entry.trajectory)

    @torch.inference_mode()
    def _look(self, song: Song, adaptations: Sequence[Adaptation], latents: NDArray[np.float32]) -> Look:
        return look(song, latents, prepare(song, self._model, adaptations).conditional, self._model)

    @torch.inference_mode()
    def _step(self, batch: Sequence[_Entry]) -> None:
        queries = [query for entry in batch if entry.wanted is not None for query in entry.wanted.queries]
        velocities = iter(
            self._model.dit(
                [query.latents for query in queries],
                torch.tensor([query.time for query in queries], device=self._model.device),
                [query.conditions.context for query in queries],
                [query.conditions.memory for query in queries],
                [query.conditions.adaptations for query in queries],
            )
        )
        for entry in batch:
            if entry.trajectory is not None and entry.wanted is not None:
                entry.advance(partial(entry.trajectory.send, [next(velocities) for _ in entry.wanted.queries]))
        if self._model.device.type == "cuda":
            # Else the host runs steps ahead of the device: progress would come early and cancel late.
            torch.cuda.synchronize(self._model.device)

    @torch.inference_mode()
    def _encode(self, latents: NDArray[np.float32]) -> NDArray[np.int64]:
        model = self._model
        codes: NDArray[np.int64] = (
            model.code_encoder(torch.from_numpy(latents).to(model.device), model.silence).cpu().numpy()
        )
        if (codes < 0).any():
            raise TokenizeError("the model's codes are not finite: the latents are too large, or float16 is too narrow")
        return codes


def _read(latents: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = latents.cpu().numpy()
    if not np.isfinite(array).all():
        raise DenoiseError("the model's latents are not finite; float32 or bfloat16 may help where float16 was used")
    return array
