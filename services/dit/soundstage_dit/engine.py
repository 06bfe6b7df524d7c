"""Step-level batching: every step of the device serves whatever songs are in flight just then."""

import asyncio
import contextvars
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundstage_dit.song import Song
from soundstage_dit.tasks import prepare
from soundstage_dit.trajectory import Evaluation, Trajectory, trajectory
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.score import LATENTS_PER_CODE
from soundstage_runtime.worker import Worker

_log = structlog.get_logger()

_FRAMES_AT_ONCE: Final = 64 * LATENTS_PER_CODE  # tokenized in one step: short beside a step of diffusion


class DenoiseError(ServiceError):
    """A step failed, or its result is not finite; the songs of other steps are not touched."""

    reason = "DENOISE_FAILED"


class TokenizeError(ServiceError):
    """Latents led to numbers that are not finite."""

    reason = "TOKENIZE_FAILED"


@dataclass(slots=True, kw_only=True, eq=False)
class _InFlight:
    song: Song
    trajectory: Trajectory
    wanted: Evaluation | None  # None at the end
    latents: Tensor | None = None  # [frames, channels], float32, at the end
    # One entry an evaluation, so their number bounds it: how many steps are done, or why one failed.
    stepped: asyncio.Queue[int | str] = field(default_factory=asyncio.Queue[int | str])

    @property
    def steps_done(self) -> int:
        return self.song.diffusion.steps if self.wanted is None else self.wanted.steps_done


class DitEngine:
    """Denoises songs, up to `max_batch` in each step; those that came first go first."""

    def __init__(self, model: LoadedModel, worker: Worker, *, max_batch: int) -> None:
        self._model, self._worker = model, worker
        self._max_batch = max_batch
        self._songs: list[_InFlight] = []
        self._steps: asyncio.Task[None] | None = None
        # A step takes its batch when its turn has come: songs that came before it are in, songs that left are not.
        self._turn = asyncio.Lock()

    @property
    def model_fingerprint(self) -> str:
        """Name the loaded model."""
        return self._model.model_fingerprint

    @property
    def num_songs(self) -> int:
        """How many songs hold memory on the device."""
        return len(self._songs)

    async def denoise(self, song: Song) -> AsyncGenerator[int | NDArray[np.float32]]:
        """Yield the number of each step done, from 1, and then the latents [frames, channels].

        Closing the generator takes the song out before the next step. Raises DenoiseError.
        """
        async with self._turn:
            entry = await self._worker.run(self._enter, song)
        self._songs.append(entry)
        if self._steps is None:
            # In a context of its own: the steps belong to no single call.
            self._steps = asyncio.create_task(self._run_steps(), context=contextvars.Context())
        try:
            done = 0
            while done < song.diffusion.steps:
                found = await entry.stepped.get()
                if isinstance(found, str):
                    raise DenoiseError(found)
                for step in range(done + 1, found + 1):
                    yield step
                done = found
        finally:
            self._leave(entry)
        assert entry.latents is not None
        yield await self._worker.run(_read, entry.latents)

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

    def close(self) -> None:
        """End the worker; waits for the step in hand."""
        self._worker.close()

    async def _run_steps(self) -> None:
        try:
            while True:
                async with self._turn:
                    batch = self._songs[: self._max_batch]
                    if not batch:
                        return
                    failure = await self._try_step(batch)
                for entry in batch:
                    if failure is not None or entry.wanted is None:
                        self._leave(entry)
                    entry.stepped.put_nowait(entry.steps_done if failure is None else failure)
        finally:
            self._steps = None

    async def _try_step(self, batch: list[_InFlight]) -> str | None:
        try:
            await self._worker.run(self._step, batch)
        except Exception as error:
            _log.exception("step_failed", songs=len(batch))
            return f"a diffusion step failed: {type(error).__name__}"
        return None

    def _leave(self, entry: _InFlight) -> None:
        if entry in self._songs:
            self._songs.remove(entry)

    @torch.inference_mode()
    def _enter(self, song: Song) -> _InFlight:
        way = trajectory(song, prepare(song, self._model))
        return _InFlight(song=song, trajectory=way, wanted=next(way))

    @torch.inference_mode()
    def _step(self, batch: list[_InFlight]) -> None:
        wanted = [entry.wanted for entry in batch if entry.wanted is not None]
        queries = [query for evaluation in wanted for query in evaluation.queries]
        velocities = iter(
            self._model.dit(
                [query.latents for query in queries],
                torch.tensor([query.time for query in queries], device=self._model.device),
                [query.conditions.context for query in queries],
                [query.conditions.memory for query in queries],
            )
        )
        for entry, evaluation in zip(batch, wanted, strict=True):
            try:
                entry.wanted = entry.trajectory.send([next(velocities) for _ in evaluation.queries])
            except StopIteration as end:
                entry.wanted, entry.latents = None, end.value
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
