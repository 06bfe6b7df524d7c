"""Listeners who play while songs are decoded: through a gateway, and beside each other at the codec in either order."""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_cli.bench.playback import Audience, Playback, draw_starts, gather, play, spread_starts
from soundstage_cli.channel import open_channel
from soundstage_cli.models import find_models
from soundstage_cli.stack import Stack
from soundstage_runtime.score import LATENT_CHANNELS, SAMPLE_RATE_HZ, SAMPLES_PER_LATENT
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine
from soundstage_vae.scheduler import Order

if TYPE_CHECKING:
    from soundstage.music.v1.song_service_pb2_grpc import SongServiceAsyncStub

ORDERS: Final[Sequence[Order]] = ("first-come", "earliest-dry")
_WINDOWS: Final = (32, 64)  # as the codec process has them on a CPU
_CROWD: Final = 1.5  # listeners for every song that the codec could decode in time: enough to be too many at once
_REHEARSED: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. Songs are `song_s` long; listeners come `gap_s` apart in the mean to the gateway."""

    listeners: int
    song_s: float
    gap_s: float
    is_poisson: bool
    rounds: int
    load: float
    threads: int
    models: Path
    gateway: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One round of an order: what its listeners heard, and how long each of them waited in all, the least first."""

    order: Order
    round: int
    audience: Audience
    waited_s: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both orders in alternating rounds. The codec decodes `speed` songs in time; all came within `window_s`."""

    speed: float
    window_s: float
    runs: Sequence[Run]


async def measure_gateway(plan: Plan, tell: Callable[[str], None]) -> Audience:
    """Let listeners have songs made by a gateway, one on this machine if the plan names none.

    Raises grpc.aio.AioRpcError, ProcessDiedError.
    """
    starts = [start * plan.gap_s for start in draw_starts(plan.listeners, is_poisson=plan.is_poisson, seed=0)]
    async with _open_gateway(plan) as target, open_channel(target) as channel:
        tell(f"{plan.listeners} listeners come to {target} within {starts[-1]:.3g} s")
        stub = SongServiceStub(channel)
        await _hear_song(stub, plan.song_s)  # a rehearsal
        return gather(await _perform(lambda: _hear_song(stub, plan.song_s), starts))


async def compare_orders(plan: Plan, tell: Callable[[str], None]) -> Comparison:
    """Let so many listeners come to a codec that it is just loaded, in one order and then in the other."""
    torch.set_num_threads(plan.threads)
    worker = Worker("vae")
    folder = Path(find_models(plan.models / "original").vae)
    codec = await worker.run(Codec, folder, device=torch.device("cpu"), dtype=torch.float32)
    latents = np.random.default_rng(0).standard_normal(
        (math.ceil(plan.song_s * SAMPLE_RATE_HZ / SAMPLES_PER_LATENT), LATENT_CHANNELS), np.float32
    )
    engines = {order: VaeEngine(codec, worker, windows=_WINDOWS, order=order) for order in ORDERS}
    speed = await _measure_speed(engines["first-come"], latents, plan.song_s)
    count = max(plan.listeners, math.ceil(_CROWD * speed))
    pattern = draw_starts(count, is_poisson=plan.is_poisson, seed=0)
    starts = spread_starts(pattern, plan.song_s, speed, plan.load)
    tell(f"the codec decodes {speed:.3g} songs in time: {count} listeners come within {starts[-1]:.3g} s")
    runs: list[Run] = []
    for number in range(1, plan.rounds + 1):
        for order in ORDERS if number % 2 else ORDERS[::-1]:
            heard = await _perform(partial(_hear_codec, engines[order], latents), starts)
            waited_s = sorted(playback.first_audio_s + sum(playback.gaps_s) for playback in heard)
            runs.append(Run(order=order, round=number, audience=gather(heard), waited_s=waited_s))
            tell(f"round {number}, {order}: {runs[-1].audience.waited_s:.3g} s waited in all")
    worker.close()
    return Comparison(speed=speed, window_s=starts[-1], runs=runs)


async def _measure_speed(engine: VaeEngine, latents: NDArray[np.float32], song_s: float) -> float:
    """Return how many songs are decoded in the time they last, after a rehearsal."""
    took_s = 0.0
    for _ in range(2):
        begun_s = time.perf_counter()
        await _perform(partial(_hear_codec, engine, latents), [0.0] * _REHEARSED)
        took_s = time.perf_counter() - begun_s
    return _REHEARSED * song_s / took_s


async def _perform(listen: Callable[[], Coroutine[Any, Any, Playback]], starts_s: Sequence[float]) -> list[Playback]:
    """Have listeners come at their times, whether those before them have been served or not."""

    async def come(start_s: float) -> Playback:
        await asyncio.sleep(start_s)
        return await listen()

    return await asyncio.gather(*map(come, starts_s))


async def _hear_song(stub: "SongServiceAsyncStub", song_s: float) -> Playback:
    request = GenerateSongRequest(caption="a calm piano", lyrics="[verse]\nla la la")
    request.metadata.duration_s = song_s
    begun_s, arrivals = time.monotonic(), list[tuple[float, float]]()
    async for event in stub.GenerateSong(request):
        if event.audio_chunk.frame_count:
            arrivals.append((time.monotonic(), event.audio_chunk.frame_count / SAMPLE_RATE_HZ))
    return play(begun_s, arrivals)


async def _hear_codec(engine: VaeEngine, latents: NDArray[np.float32]) -> Playback:
    async def source() -> AsyncGenerator[NDArray[np.float32], None]:
        yield latents

    begun_s, arrivals = time.monotonic(), list[tuple[float, float]]()
    async for samples in engine.decode(source(), len(latents), range(len(latents) * SAMPLES_PER_LATENT)):
        arrivals.append((time.monotonic(), len(samples) / SAMPLE_RATE_HZ))
    return play(begun_s, arrivals)


@asynccontextmanager
async def _open_gateway(plan: Plan) -> AsyncGenerator[str, None]:
    """Give the address of the plan's gateway, or of one that lives as long as the block."""
    if plan.gateway is not None:
        yield plan.gateway
        return
    places = str(plan.listeners)
    # Whoever waits for a place is out of the codec's sight: the order would count for nothing.
    settings = {"SOUNDSTAGE_GATEWAY_MAX_SONGS": places, "SOUNDSTAGE_VAE_MAX_IN_FLIGHT": places}
    # Three stages are at work at once, and teams of threads that share cores wait for each other.
    settings["OMP_NUM_THREADS"] = "1"
    stack = Stack(find_models(plan.models / "original"), settings=settings)
    try:
        await stack.start()
        yield stack.target
    finally:
        await stack.stop()
