"""How long a whole song takes from words to sound, without a planner: three ways over the same random weights.

Diffusers' pipeline; our own modules in one process, which answers the song when all of it is decoded, as pipelines do;
and our processes over gRPC, which stream it. Rounds alternate, and a ratio is taken within each round.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, cast

import grpc.aio
import numpy as np
import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from numpy.typing import NDArray
from rich.table import Table

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, PlannerOptions
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_cli.bench.report import Spread, name_machine, spread, write_figures
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE: Final = "diffusers"
ONE_PROCESS: Final = "one process"
OURS: Final = "soundstage"
_CAPTION: Final = "a slow waltz for piano and strings"
_LYRICS: Final = "[verse]\nthe river runs\n[chorus]\nand we run with it"
_STEPS: Final = 8
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How long a song took, and its first audio."""

    engine: str
    duration_s: int
    round: int
    song_s: float
    first_audio_s: float

    def __str__(self) -> str:
        return f"{self.engine}, {self.duration_s} s: {self.song_s:.3g} s, first audio after {self.first_audio_s:.3g} s"


Make = Callable[[int, int], AsyncIterator[int]]
"""Make a song of so many seconds from a seed, and yield the number of audio frames as they come."""


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
                engines: dict[str, Make] = {
                    BASELINE: await _open_diffusers(pipeline, worker),
                    ONE_PROCESS: await _open_one_process(models, worker),
                    OURS: _open_soundstage(channel),
                }
                # A rehearsal first: memory is taken, and kernels are made, at first use.
                for number in range(plan.rounds + 1):
                    runs = [
                        await _clock(engine, duration_s, number, make)
                        for duration_s in plan.durations_s
                        for engine, make in engines.items()
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
            num_inference_steps=_STEPS,
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
            diffusion=DiffusionOptions(steps=_STEPS),
            seeds=[seed],
        )
        async for event in SongServiceStub(channel).GenerateSong(request):
            if event.HasField("audio_chunk"):
                yield event.audio_chunk.frame_count

    return make


async def _clock(engine: str, duration_s: int, number: int, make: Make) -> Run:
    started_s = time.perf_counter()
    first_s, num_frames = 0.0, 0
    async for count in make(duration_s, number):
        first_s = first_s or time.perf_counter() - started_s
        num_frames += count
    song_s = time.perf_counter() - started_s
    assert num_frames == duration_s * 48_000, f"{engine} made {num_frames} frames"
    return Run(engine=engine, duration_s=duration_s, round=number, song_s=song_s, first_audio_s=first_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How long an engine takes for a song; ratios are to the baseline and to one process in the same round."""

    engine: str
    duration_s: int
    song_s: Spread
    first_audio_s: Spread
    times_baseline: Spread
    share_of_one_process: Spread


def summarize(runs: Sequence[Run]) -> list[Summary]:
    """Sum up the rounds."""
    took = {(run.engine, run.duration_s, run.round): run.song_s for run in runs}
    summaries: list[Summary] = []
    for engine, duration_s in dict.fromkeys((run.engine, run.duration_s) for run in runs):
        own = [run for run in runs if (run.engine, run.duration_s) == (engine, duration_s)]
        summaries.append(
            Summary(
                engine=engine,
                duration_s=duration_s,
                song_s=spread([run.song_s for run in own]),
                first_audio_s=spread([run.first_audio_s for run in own]),
                times_baseline=spread([took[BASELINE, duration_s, run.round] / run.song_s for run in own]),
                share_of_one_process=spread([run.song_s / took[ONE_PROCESS, duration_s, run.round] for run in own]),
            )
        )
    return summaries


def make_table(summaries: Sequence[Summary]) -> Table:
    """Lay the figures out for people."""
    table = Table(title="a whole song: median (least–most)")
    headings = (
        "way",
        "song, s",
        "took, s",
        "first audio, s",
        f"times as fast as {BASELINE}",
        f"share of {ONE_PROCESS}",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for one in summaries:
        figures = (one.song_s, one.first_audio_s, one.times_baseline, one.share_of_one_process)
        table.add_row(one.engine, str(one.duration_s), *map(str, figures))
    return table


def write_report(folder: Path, plan: Plan, runs: Sequence[Run]) -> list[Path]:
    """Write song-SIZE.json, and a picture where matplotlib is installed; returns the files."""
    summaries = summarize(runs)
    report = {
        "machine": name_machine("cpu", plan.threads),
        "size": plan.size,
        "steps": _STEPS,
        "dtype": "float32",
        "summaries": [asdict(summary) for summary in summaries],
        "runs": [asdict(run) for run in runs],
    }
    return write_figures(folder, f"song-{plan.size}", report, lambda figure: _draw(figure, summaries))


def _draw(figure: "Figure", summaries: Sequence[Summary]) -> None:
    axes = figure.subplots()
    labels = [f"{one.engine}\n{one.duration_s} s" for one in summaries]
    axes.bar(labels, [one.song_s.median for one in summaries], color="tab:blue", label="whole song")
    axes.bar(labels, [one.first_audio_s.median for one in summaries], color="tab:orange", label="until first audio")
    axes.set(ylabel="seconds")
    axes.legend()
