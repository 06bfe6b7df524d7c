"""How long a whole song takes from words to sound, without a planner: three ways over the same random weights.

Diffusers' pipeline; our own modules in one process, which answers the song when all of it is decoded, as pipelines do;
and our processes over gRPC, which stream it. Several songs take our processes in turn, each ordered when the one before
it is done, or overlapping, each ordered when the one before it is first heard: that one is still decoded then, while
the next is denoised. Rounds alternate, and a ratio is taken within each round.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, Final, cast

import grpc.aio
import numpy as np
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from numpy.typing import NDArray

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, PlannerOptions
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_cli.models import Models
from soundstage_cli.stack import Stack
from soundstage_cli.tiny.dit import MID, TINY, write_diffusers, write_original
from soundstage_cli.tiny.lm import write_lm
from soundstage_cli.tiny.vae import write_vae
from soundstage_dit.engine import DitEngine
from soundstage_dit.models import load_models
from soundstage_dit.settings import DitSettings
from soundstage_dit.song import Diffusion, Song
from soundstage_runtime.score import SAMPLES_PER_LATENT
from soundstage_runtime.worker import Worker
from soundstage_vae.codec import Codec
from soundstage_vae.engine import VaeEngine
from soundstage_vae.tiling import window_lengths

BASELINE: Final = "diffusers"
ONE_PROCESS: Final = "one process"
OURS: Final = "soundstage"
IN_TURN: Final = "several in turn"
OVERLAPPING: Final = "several overlapping"
STEPS: Final = 8
_CAPTION: Final = "a slow waltz for piano and strings"
_LYRICS: Final = "[verse]\nthe river runs\n[chorus]\nand we run with it"
_FRAMES_PER_S: Final = 25
_SIZES: Final = {"mid": (MID, 32, (1, 2, 4, 8, 16)), "tiny": (TINY, 8, (1, 1, 1, 1, 1))}
SIZES: Final = tuple(_SIZES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    size: str
    durations_s: Sequence[int]
    rounds: int
    threads: int
    together: int  # songs in turn and overlapping; 0 for neither


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How long a song took, and its first audio; of several, the time of all by their number, and the mean wait."""

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
    """Yield the runs of each round, the baseline first."""
    with TemporaryDirectory() as folder:
        tell(f"making random weights of size {plan.size}")
        # The one thread for all torch work of this process: with a second, each of their kernels would wait for cores.
        worker = Worker("bench")
        await worker.run(torch.set_num_threads, plan.threads)
        models, pipeline = await worker.run(write_models, Path(folder), plan.size)
        stack = Stack(models, settings={"OMP_NUM_THREADS": str(plan.threads)})
        await stack.start()
        try:
            async with grpc.aio.insecure_channel(stack.target) as channel:
                ours = _open_soundstage(channel)
                ways = {
                    BASELINE: Way(make=await _open_diffusers(pipeline, worker)),
                    ONE_PROCESS: Way(make=await _open_one_process(models, worker)),
                    OURS: Way(make=ours),
                }
                if plan.together:
                    ways[IN_TURN] = Way(make=ours, num_songs=plan.together)
                    ways[OVERLAPPING] = Way(make=ours, num_songs=plan.together, is_overlapping=True)
                # A rehearsal first: memory is taken, and kernels are made, at first use.
                for number in range(plan.rounds + 1):
                    runs = [
                        await clock(engine, way, duration_s, number)
                        for duration_s in plan.durations_s
                        for engine, way in ways.items()
                    ]
                    tell(f"{f'round {number}' if number else 'rehearsal'}: {'; '.join(map(str, runs))}")
                    if number:
                        yield runs
        finally:
            await stack.stop()


def write_models(folder: Path, size: str) -> tuple[Models, Path]:
    """Write the same weights as the stages load them and as diffusers' pipeline does; return both."""
    shape, channels, multiples = _SIZES[size]
    dit = write_original(folder, size=shape)
    pipeline = write_diffusers(folder / "pipeline", size=shape)
    for vae in (folder / "vae", pipeline / "vae"):
        write_vae(vae, channels=channels, multiples=multiples)
    write_lm(folder / "lm")
    return Models(lm=str(folder / "lm"), dit=str(dit), vae=str(folder / "vae")), pipeline


async def _open_diffusers(folder: Path, worker: Worker) -> Make:
    pipe = cast(Any, await worker.run(AceStepPipeline.from_pretrained, folder))
    pipe.set_progress_bar_config(disable=True)

    def run(duration_s: int, seed: int) -> int:
        audio = pipe(
            prompt=_CAPTION,
            lyrics=_LYRICS,
            audio_duration=float(duration_s),
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
            return_dict=False,
        )[0]
        return int(audio.shape[-1])

    async def make(duration_s: int, seed: int) -> AsyncIterator[int]:
        yield await worker.run(run, duration_s, seed)

    return make


async def _open_one_process(models: Models, worker: Worker) -> Make:
    cpu = torch.device("cpu")
    loaded, _ = await worker.run(load_models, DitSettings.model_validate({"model": [models.dit]}), cpu, torch.float32)
    codec = await worker.run(Codec, Path(models.vae), device=cpu, dtype=torch.float32)
    dit, vae = DitEngine(loaded, worker), VaeEngine(codec, worker, windows=window_lengths(32, 64))

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
            audio = np.concatenate([piece async for piece in pieces])
        yield len(audio)

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
