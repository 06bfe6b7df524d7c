"""Step-level batching: every step of the device serves whatever songs of a model are in flight just then."""

import asyncio
import contextvars
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from soundstage_device.worker import DeviceMemoryError
from soundstage_dit.adapters import Adapters, Loan
from soundstage_dit.aligner import Look, align, look, look_bytes, score
from soundstage_dit.alignment import Alignment
from soundstage_dit.guard import Guard
from soundstage_dit.journey import DenoiseError, Journey
from soundstage_dit.line import Line, Visit
from soundstage_dit.memory import estimate_bytes
from soundstage_dit.model.adapter import Adaptation
from soundstage_dit.residence import Residence
from soundstage_dit.scheduler import Load, Queued, Room, charge, count_tokens, take_turn
from soundstage_dit.song import Latents, Song
from soundstage_dit.tasks import prepare
from soundstage_dit.tokenizing import cut, encode
from soundstage_dit.trajectory import Evaluation, trajectory
from soundstage_dit.weights import LoadedModel
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.score import MAX_LATENT_FRAMES
from soundstage_runtime.worker import Worker

_log = structlog.get_logger()

_GROWTH: Final = 64  # after a step that ran out of memory each may be larger than the last by so small a part
_LATEST_SHARE: Final = 0.2  # of the latest step in the time that a token is said to take

T = TypeVar("T")


class DitEngine:
    """Denoises songs, step by step, each with the model that it names.

    At most `max_songs` hold memory at once, `max_songs_gb` in all by estimate; up to `max_waiting` wait for it, first
    come first served. A step takes the song that has had least, and others of its model, up to `max_batch` and to
    `max_tokens`, where two frames of one velocity are a token, and to what `free_bytes` has room for just then. Where a
    step runs out of memory all the same its songs take it one by one, and the next steps have fewer tokens. Without a
    `residence`, all models stay on the device.
    """

    def __init__(
        self,
        models: Sequence[LoadedModel],
        worker: Worker,
        *,
        adapters: Adapters | None = None,
        residence: Residence | None = None,
        free_bytes: Callable[[], float] = lambda: math.inf,
        max_batch: int = 8,
        max_tokens: int = count_tokens(MAX_LATENT_FRAMES),
        max_songs: int = 8,
        max_songs_gb: float = 4.0,
        max_waiting: int = 64,
    ) -> None:
        """The first model is the default one."""
        self._models = {"": models[0]} | {model.model_fingerprint: model for model in models}
        self._worker, self._residence = worker, residence
        self._adapters = adapters or Adapters(models, worker)
        self._guard = Guard(free_bytes)
        self._max_batch, self._max_tokens = max_batch, max_tokens
        self._tokens_at_once = max_tokens  # less after a step that ran out of memory
        self._room = Room(
            max_songs=max_songs,
            max_bytes=round(max_songs_gb * 1e9),
            max_model_bytes=math.inf if residence is None else residence.max_bytes,
        )
        self._line = Line(self._room, max_waiting=max_waiting)
        self._aligning = asyncio.Lock()
        self._in_hand: Sequence[Journey] = ()  # of the worker, which holds on to their tensors
        self._steps: asyncio.Task[None] | None = None

    @property
    def num_songs(self) -> int:
        """How many songs hold memory on the device."""
        return len(self._line.songs)

    @property
    def num_waiting(self) -> int:
        """How many songs wait for memory on the device."""
        return self._line.num_waiting

    async def denoise(self, song: Song, adapters: Loan | None = None) -> AsyncGenerator[int | Queued | Latents]:
        """Yield where the song waits, if it must, the number of each step done, from 1, and then the latents.

        They are [frames, channels]. Closing the generator takes the song out before the next step. Raises DenoiseError,
        SongTooLargeError, OverloadedError where too many wait, and AdapterNotFoundError or AdapterMismatchError where
        `adapters` are not given and are still to be found.
        """
        model = self._models[song.model]
        journey = Journey(
            song=song,
            model=model,
            size_bytes=estimate_bytes(song, model),
            parts=self._parts(model),
            adaptations=self._adaptations(song, adapters),
        )
        self._line.enter(journey)
        self._go_on()
        try:
            done = 0
            while True:
                match await journey.events.get():
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
            self._leave(journey)
        yield await self._worker.run(_read, latents)

    async def tokenize(self, latents: AsyncIterator[Latents], model: str = "") -> AsyncGenerator[NDArray[np.int64]]:
        """Yield the codes of latents [frames, channels] that come in runs; raises TokenizeError.

        A closed generator asks for no more pieces.
        """
        async for piece in cut(latents):
            yield await self._visit(self._models[model], partial(encode, latents=piece))

    async def align(self, song: Song, latents: Latents, adapters: Loan | None = None) -> Alignment:
        """Tell when the lyrics of a song that was made are sung; raises UncalibratedError and AlignError.

        One song at a time: what is looked at is large. The adapters it was made with must still be there: raises
        AdapterGoneError.
        """
        model, adaptations = self._models[song.model], self._adaptations(song, adapters)

        async def see(time: float) -> Look:
            work = partial(_look, song, adaptations, latents, time)
            return await self._visit(model, work, size_bytes=look_bytes(song, model))

        async with self._aligning:
            plan_score = await score(await see(1.0))
            return replace(await align(await see(1 / song.diffusion.steps)), plan_score=plan_score)

    def close(self) -> None:
        """End the worker; waits for the step in hand."""
        self._worker.close()

    async def _visit(self, model: LoadedModel, work: Callable[[LoadedModel], T], *, size_bytes: int = 0) -> T:
        """Have the worker use a model, as soon as there is room for it, and for so much beside it, on the device."""
        size_bytes = min(size_bytes, self._room.max_bytes)  # alone it is tried
        load = Load(tokens_left=0, size_bytes=size_bytes, parts=self._parts(model), is_song=False)
        visit = Visit(model=model, load=load)
        try:
            await self._line.visit(visit)
            return await self._run(model, partial(work, model))
        finally:
            self._line.leave(visit)
            self._go_on()

    def _adaptations(self, song: Song, found: Loan | None) -> tuple[Adaptation, ...]:
        loan = found or self._adapters.find(song.adapters, song.model)
        return loan.adaptations()

    def _parts(self, model: LoadedModel) -> Mapping[int, int]:
        return self._residence.sizes(model) if self._residence else {}

    def _leave(self, journey: Journey) -> None:
        self._line.leave(journey)
        if journey not in self._in_hand:
            journey.drop()
        self._go_on()

    def _go_on(self) -> None:
        if self._line.songs and self._steps is None:
            # In a context of its own: the steps belong to no single call.
            self._steps = asyncio.create_task(self._run_steps(), context=contextvars.Context())

    async def _run_steps(self) -> None:
        try:
            while self._line.songs:
                try:
                    await self._prepare_songs()
                    if batch := take_turn(self._line.begun, max_songs=self._max_batch, max_tokens=self._tokens_at_once):
                        await self._take_step(self._guard.lower(batch))
                except Exception as error:  # of ours, as the worker's are caught: no call may wait for ever
                    _log.exception("turn_failed", songs=len(self._line.songs))
                    for journey in list(self._line.songs):
                        journey.events.put_nowait(DenoiseError(f"a turn of the songs failed: {type(error).__name__}"))
                        self._leave(journey)
        finally:
            self._steps = None

    async def _prepare_songs(self) -> None:
        songs = self._line.songs
        for journey in [journey for journey in songs if journey.trajectory is None]:
            if journey in songs:  # it may have left while another was prepared
                if not self._guard.lets_begin(journey, self._line.begun):
                    break
                journey.used = min((other.used for other in self._line.begun), default=0)
                if self._residence and not self._residence.has(journey.model):
                    wait_s = self._residence.wait_s(journey.model)
                    journey.events.put_nowait(Queued(position=0, wait_s=wait_s))
                await self._work([journey], self._prepare)

    async def _take_step(self, batch: Sequence[Journey]) -> None:
        tokens = sum(journey.tokens for journey in batch)
        for journey in batch:
            journey.used += charge(journey.tokens)
        start = time.perf_counter()
        await self._work(batch, self._step)
        self._tokens_at_once = min(self._max_tokens, self._tokens_at_once + 1 + self._tokens_at_once // _GROWTH)
        latest = (time.perf_counter() - start) / tokens
        known = self._line.seconds_per_token or latest
        self._line.seconds_per_token = known + _LATEST_SHARE * (latest - known)

    async def _work(self, batch: Sequence[Journey], work: Callable[[Sequence[Journey]], None]) -> None:
        """Have the worker move songs of one model on, and tell each of them what has come of it."""
        failure = await self._attempt(batch, work)
        if isinstance(failure, DeviceMemoryError) and len(batch) > 1:
            self._tokens_at_once = max(1, sum(journey.tokens for journey in batch) // 2)
            _log.warning("step_ran_out_of_memory", songs=len(batch), tokens_at_once=self._tokens_at_once)
            for journey in batch:
                if journey in self._line.songs:
                    await self._work([journey], work)
                else:
                    journey.drop()
            return
        for journey in batch:
            journey.failure = journey.failure or failure
            if journey not in self._line.songs:
                journey.drop()
            elif journey.tell():
                self._leave(journey)

    async def _attempt(
        self, batch: Sequence[Journey], work: Callable[[Sequence[Journey]], None]
    ) -> ServiceError | None:
        """Have the worker do something for songs of one model; returns what failed for all of them."""
        self._in_hand = batch
        try:
            await self._run(batch[0].model, partial(work, batch))
        except DeviceMemoryError as error:
            return error
        except Exception as error:
            _log.exception("step_failed", songs=len(batch))
            return DenoiseError(f"a diffusion step failed: {type(error).__name__}")
        finally:
            self._in_hand = ()
        return None

    async def _run(self, model: LoadedModel, work: Callable[[], T]) -> T:
        """Have the worker do something with a model, which it brings to the device first."""

        @torch.inference_mode()
        def run(in_use: Collection[LoadedModel]) -> T:
            if self._residence:
                self._residence.bring_in(model, in_use)
            done = work()
            self._guard.look()
            return done

        return await self._worker.run(run, self._line.models_in_use)

    def _prepare(self, batch: Sequence[Journey]) -> None:
        for journey in batch:
            journey.advance(partial(_set_out, journey))

    def _step(self, batch: Sequence[Journey]) -> None:
        model = batch[0].model
        queries = [query for journey in batch if journey.wanted is not None for query in journey.wanted.queries]
        velocities = iter(
            model.dit(
                [query.latents for query in queries],
                torch.tensor([query.time for query in queries], device=model.device),
                [query.conditions.context for query in queries],
                [query.conditions.memory for query in queries],
                [query.conditions.adaptations for query in queries],
            )
        )
        for journey in batch:
            if journey.trajectory is not None and journey.wanted is not None:
                journey.advance(partial(journey.trajectory.send, [next(velocities) for _ in journey.wanted.queries]))
        if model.device.type == "cuda":
            # Else the host runs steps ahead of the device: progress would come early and cancel late.
            torch.cuda.synchronize(model.device)


def _set_out(journey: Journey) -> Evaluation:
    journey.trajectory = trajectory(journey.song, prepare(journey.song, journey.model, journey.adaptations))
    return next(journey.trajectory)


def _look(song: Song, adaptations: Sequence[Adaptation], latents: Latents, time: float, model: LoadedModel) -> Look:
    return look(song, latents, prepare(song, model, adaptations).conditional, model, time=time)


def _read(latents: Tensor) -> Latents:
    array: Latents = latents.cpu().numpy()
    if not np.isfinite(array).all():
        raise DenoiseError("the model's latents are not finite; float32 or bfloat16 may help where float16 was used")
    return array
