"""How long a whole song takes from words to sound, without a planner: three ways over the same random weights.

Diffusers' pipeline, which answers the song when all of it is decoded; our own modules in one process; and our processes
over gRPC. Both of ours are first heard when the first tile is decoded. Several songs take our processes in turn, each
ordered when the one before it is done, or overlapping, each ordered when the one before it is first heard: that one is
still decoded then, while the next is denoised. Rounds alternate, and a ratio is taken within each round. Where
diffusers' transformer is measured compiled too there are as many rounds again with all of them. Diffusers' pipeline is
in a process of its own, where a CPU's memory is as glibc gives it, and in another, where all that is freed is kept.
"""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Final

import grpc.aio
import numpy as np
import torch
from numpy.typing import NDArray

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, PlannerOptions
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_budget.engine_choice import can_compile
from soundstage_cli.bench.clock import is_enough
from soundstage_cli.bench.pipeline import Pipeline, Setup, Task
from soundstage_cli.models import Models
from soundstage_cli.stack import Stack
from soundstage_cli.tiny.dit import MID, REAL, TINY, write_diffusers
from soundstage_cli.tiny.lm import write_lm
from soundstage_cli.tiny.vae import write_vae
from soundstage_device.budget import keep_freed_memory
from soundstage_device.device import choose_device, describe_card
from soundstage_dit.engine import DitEngine
from soundstage_dit.models import load_models
from soundstage_dit.settings import DitSettings
from soundstage_dit.song import Diffusion, Song
from soundstage_runtime.score import SAMPLES_PER_LATENT
from soundstage_runtime.worker import Worker
from soundstage_vae.__main__ import plan as plan_tiles
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine
from soundstage_vae.settings import VaeSettings
from soundstage_vae.size import read_size

BASELINE: Final = "diffusers"
BASELINE_COMPILED: Final = "diffusers, compiled"
BASELINE_KEPT: Final = "diffusers, memory kept"
ONE_PROCESS: Final = "one process"
OURS: Final = "soundstage"
IN_TURN: Final = "several in turn"
OVERLAPPING: Final = "several overlapping"
STEPS: Final = 8
_CAPTION: Final = "a slow waltz for piano and strings"
_LYRICS: Final = "[verse]\nthe river runs\n[chorus]\nand we run with it"
_FRAMES_PER_S: Final = 25
_SIZES: Final = {
    "2B": (REAL, 128, (1, 2, 4, 8, 16), torch.bfloat16),
    "mid": (MID, 32, (1, 2, 4, 8, 16), torch.float32),
    "tiny": (TINY, 8, (1, 1, 1, 1, 1), torch.float32),
}
SIZES: Final = tuple(_SIZES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    size: str
    durations_s: Sequence[int]
    rounds: int
    threads: int
    together: int  # songs in turn and overlapping; 0 for neither
    device: str
    dtype: str
    is_compiled: bool  # diffusers' transformer too, compiled; ours is where the stages compile it
    cache: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How long a song took, and its first audio; of several, the time of all by their number, and the mean wait.

    Where a song takes little time these are the middles of several.
    """

    engine: str
    duration_s: int
    round: int
    song_s: float
    first_audio_s: float

    def __str__(self) -> str:
        return f"{self.engine}, {self.duration_s} s: {self.song_s:.3g} s, first audio after {self.first_audio_s:.3g} s"


Make = Callable[[int, int], AsyncIterator[int]]
"""Make a song of so many seconds from a seed, and yield the number of audio frames as they come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How songs are made, how many, and whether each is ordered when the one before it is first heard, not done."""

    make: Make
    num_songs: int = 1
    is_overlapping: bool = False


async def measure(plan: Plan, tell: Callable[[str], None]) -> AsyncIterator[list[Run]]:
    """Yield the runs of each round, the baseline first. Raises ProcessDiedError."""
    keep_freed_memory()  # before there are threads
    # The one thread for all torch work of this process: with a second, each of their kernels would wait for cores.
    worker = Worker("bench")
    await worker.run(torch.set_num_threads, plan.threads)
    tell(f"random weights of size {plan.size}: making them, if they are not in {plan.cache}")
    models = await worker.run(write_models, plan.cache, plan.size, plan.device)
    where = ["--device", plan.device, "--dtype", plan.dtype]
    flags = {"lm": ["--device", "cpu", "--engine", "torch"], "dit": where, "vae": where}
    stack = Stack(models, settings={"OMP_NUM_THREADS": str(plan.threads)}, flags=flags)
    setup = Setup(folder=models.dit, device=plan.device, dtype=plan.dtype, threads=plan.threads)
    task = Task(caption=_CAPTION, lyrics=_LYRICS, steps=STEPS)
    peers = ExitStack()

    def open_diffusers(**changes: bool) -> Way:
        return Way(make=peers.enter_context(Pipeline(replace(setup, **changes), task)).make)

    tell("starting our processes")
    try:
        await stack.start()
        async with grpc.aio.insecure_channel(stack.target) as channel:
            ours = _open_soundstage(channel)
            ways = {BASELINE: open_diffusers()}
            if plan.device == "cpu":
                ways[BASELINE_KEPT] = open_diffusers(keeps_memory=True)
            ways |= {
                ONE_PROCESS: Way(make=await _open_one_process(models, plan, worker)),
                OURS: Way(make=ours),
            }
            if plan.together:
                ways[IN_TURN] = Way(make=ours, num_songs=plan.together)
                ways[OVERLAPPING] = Way(make=ours, num_songs=plan.together, is_overlapping=True)
            await _perform(ways, plan, 0, tell)
            for number in range(plan.rounds):
                yield await _perform(ways, plan, number + 1, tell)
            compiled = open_diffusers(is_compiled=True)  # starts nothing until it is used
            if plan.is_compiled and await _rehearse_compiled(compiled, plan, tell):
                ways = {BASELINE: ways[BASELINE], BASELINE_COMPILED: compiled} | ways
                for number in range(plan.rounds, 2 * plan.rounds):
                    yield await _perform(ways, plan, number + 1, tell)
    finally:
        peers.close()
        await stack.stop()


async def _perform(ways: Mapping[str, Way], plan: Plan, number: int, tell: Callable[[str], None]) -> list[Run]:
    """Make songs in all ways; round 0 is a rehearsal: memory is taken, and kernels are made, at first use."""
    runs = [
        await _repeat(engine, way, duration_s, number)
        for duration_s in plan.durations_s
        for engine, way in ways.items()
    ]
    tell(f"{f'round {number}' if number else 'rehearsal'}: {'; '.join(map(str, runs))}")
    return runs


async def _rehearse_compiled(way: Way, plan: Plan, tell: Callable[[str], None]) -> bool:
    """Compile diffusers' transformer and make songs with it; returns whether that went well."""
    tell(f"{BASELINE_COMPILED}: compiling")
    try:
        await _perform({BASELINE_COMPILED: way}, plan, 0, tell)
    except Exception as error:  # theirs to fail in any way: the others are measured all the same
        tell(f"{BASELINE_COMPILED} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return False
    return True


def write_models(cache: Path, size: str, device: str) -> Models:
    """Find the random weights of a size, which are drawn on a device if they are not there.

    They are a pipeline of diffusers', which the stages load too, and a planner, which has nothing to do.
    """
    shape, channels, multiples, dtype = _SIZES[size]
    folder = cache / f"random-song-{size}"
    if not folder.is_dir():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        pipeline = write_diffusers(unfinished / "pipeline", size=shape, device=device, dtype=dtype)
        write_vae(pipeline / "vae", channels=channels, multiples=multiples)
        write_lm(unfinished / "lm")
        unfinished.rename(folder)
    return Models(lm=str(folder / "lm"), dit=str(folder / "pipeline"), vae=str(folder / "pipeline" / "vae"))


async def _open_one_process(models: Models, plan: Plan, worker: Worker) -> Make:
    """Load our modules as the stages do."""
    device, dtype = choose_device(plan.device), getattr(torch, plan.dtype)
    loaded, _ = await worker.run(load_models, DitSettings.model_validate({"model": [models.dit]}), device, dtype)
    codec = await worker.run(Codec, Path(models.vae), device=device, dtype=dtype)
    if can_compile(describe_card(device)):
        await worker.run(codec.compile_snakes)
    settings = VaeSettings.model_validate({"model": models.vae})
    batches = await worker.run(plan_tiles, codec, read_size(Path(models.vae)), settings)
    dit, vae = DitEngine(loaded, worker), VaeEngine(codec, worker, windows=tuple(batches), batches=batches)

    async def make(duration_s: int, seed: int) -> AsyncIterator[int]:
        song = Song(
            caption=_CAPTION,
            lyrics=_LYRICS,
            num_frames=duration_s * _FRAMES_PER_S,
            seed=seed,
            duration_s=duration_s,
            diffusion=Diffusion(),
        )
        *_, latents = [event async for event in dit.denoise(song)]
        assert isinstance(latents, np.ndarray)

        async def whole() -> AsyncIterator[NDArray[np.float32]]:
            yield latents

        num_samples = song.num_frames * SAMPLES_PER_LATENT
        async with aclosing(vae.decode(whole(), song.num_frames, range(num_samples))) as pieces:
            async for piece in pieces:
                yield len(piece)

    return make


def _open_soundstage(channel: grpc.aio.Channel) -> Make:
    async def make(duration_s: int, seed: int) -> AsyncIterator[int]:
        request = GenerateSongRequest(
            caption=_CAPTION,
            lyrics=_LYRICS,
            metadata=SongMetadata(duration_s=duration_s),
            planner=PlannerOptions(enabled=False),
            diffusion=DiffusionOptions(steps=STEPS),
            seeds=[seed],
        )
        async for event in SongServiceStub(channel).GenerateSong(request):
            if event.HasField("audio_chunk"):
                yield event.audio_chunk.frame_count

    return make


async def _repeat(engine: str, way: Way, duration_s: int, number: int) -> Run:
    runs = [await clock(engine, way, duration_s, number)]
    while not is_enough([run.song_s * way.num_songs for run in runs]):
        runs.append(await clock(engine, way, duration_s, number))
    firsts_s = [run.first_audio_s for run in runs]
    return replace(runs[0], song_s=median(run.song_s for run in runs), first_audio_s=median(firsts_s))


async def clock(engine: str, way: Way, duration_s: int, number: int) -> Run:
    """Make a way's songs once, with seeds from the round's number on."""
    waits_s: list[float] = []

    async def hear(seed: int, is_heard: asyncio.Event) -> None:
        ordered_s, num_frames = time.perf_counter(), 0
        async for count in way.make(duration_s, seed):
            if not num_frames:
                waits_s.append(time.perf_counter() - ordered_s)
                is_heard.set()
            num_frames += count
        assert num_frames == duration_s * 48_000, f"{engine} made {num_frames} frames"

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as songs:
        for seed in range(number, number + way.num_songs):
            is_heard = asyncio.Event()
            song = songs.create_task(hear(seed, is_heard))
            await (is_heard.wait() if way.is_overlapping else song)
    song_s = (time.perf_counter() - started_s) / way.num_songs
    return Run(engine=engine, duration_s=duration_s, round=number, song_s=song_s, first_audio_s=fmean(waits_s))
