"""How fast songs are planned: the planner process on each engine, and transformers' generate with guidance.

Random weights of the released planners' smallest shape are as fast as trained ones. Rounds alternate, so that whatever
else the machine does befalls all of them alike, and a ratio is taken within each round.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc.aio

from soundstage.stage.v1.lm_service_pb2 import ComposeRequest
from soundstage.stage.v1.lm_service_pb2_grpc import LmServiceStub
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_cli.bench.generate import Transformers
from soundstage_cli.bench.stage import run_stage
from soundstage_cli.tiny.lm import SMALL, TINY, write_lm

SHAPES: Final = {"0.6B": SMALL, "tiny": TINY}
BASELINE: Final = "transformers"
CAPTION: Final = "a warm lo-fi beat"
LYRICS: Final = "[Instrumental]"
_REHEARSED_CODES: Final = 10
_FINISHED: Final = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one engine did with some songs at once. The rate is that of the time in which codes of all songs came."""

    engine: str
    songs: int
    round: int
    codes_per_s: float
    first_code_s: float  # the middle song's

    def __str__(self) -> str:
        return f"{self.engine} with {self.songs} {self.codes_per_s:.1f} codes/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    size: str
    engines: Sequence[str]
    songs: Sequence[int]
    rounds: int
    num_codes: int
    threads: int
    device: str
    dtype: str
    cache: Path
    vllm_python: Path


async def measure(plan: Plan, tell: Callable[[str], None]) -> AsyncIterator[list[Run]]:
    """Yield the runs of each round, the baseline first. Raises StageDiedError."""
    folder = await asyncio.to_thread(write_checkpoint, plan.size, plan.cache, plan.device)
    async with AsyncExitStack() as stack:
        tell(f"loading {folder}")
        baseline = await asyncio.to_thread(
            Transformers, folder, device=plan.device, dtype=plan.dtype, threads=plan.threads
        )
        channels: dict[str, grpc.aio.Channel] = {}
        for engine in plan.engines:
            target = await stack.enter_async_context(
                run_stage(
                    folder,
                    engine=engine,
                    device=plan.device,
                    dtype=plan.dtype,
                    threads=plan.threads,
                    max_songs=max(plan.songs),
                    python=plan.vllm_python if engine == "vllm" else None,
                )
            )
            channels[engine] = await stack.enter_async_context(grpc.aio.insecure_channel(target))
        # A rehearsal first: weights are laid out, and memory is taken, at first use.
        for number in range(plan.rounds + 1):
            num_codes = plan.num_codes if number else _REHEARSED_CODES
            runs = [await _measure_baseline(baseline, number, num_codes)]
            for songs in plan.songs:
                for engine in plan.engines:
                    runs.append(await _measure_stage(channels[engine], engine, songs, number, num_codes))
            if number:
                tell(f"round {number}: {', '.join(map(str, runs))}")
                yield runs


def write_checkpoint(size: str, cache: Path, device: str) -> Path:
    """Return the folder of the random checkpoint of a size, drawing it on a device if it is not there."""
    folder = cache / f"random-lm-{size}"
    if not (folder / _FINISHED).is_file():
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        write_lm(unfinished, shape=SHAPES[size], device=device)
        unfinished.rename(folder)
    return folder


async def _measure_baseline(baseline: Transformers, number: int, num_codes: int) -> Run:
    start = time.perf_counter()
    times = await asyncio.to_thread(baseline.write, CAPTION, LYRICS, num_codes)
    return Run(
        engine=BASELINE,
        songs=1,
        round=number,
        codes_per_s=(len(times) - 1) / (times[-1] - times[0]),
        first_code_s=times[0] - start,
    )


async def _measure_stage(channel: grpc.aio.Channel, engine: str, songs: int, number: int, num_codes: int) -> Run:
    start = time.perf_counter()
    seeds = range(1000 * number, 1000 * number + songs)
    arrivals = await asyncio.gather(*(_write_song(channel, seed, num_codes) for seed in seeds))
    first = max(times[0] for times in arrivals)
    last = min(times[-1] for times in arrivals)
    if first >= last:  # short songs: the first has ended when the last begins
        first, last = min(times[0] for times in arrivals), max(times[-1] for times in arrivals)
    return Run(
        engine=engine,
        songs=songs,
        round=number,
        codes_per_s=sum(first < at <= last for times in arrivals for at in times) / (last - first),
        first_code_s=sorted(times[0] for times in arrivals)[songs // 2] - start,
    )


async def _write_song(channel: grpc.aio.Channel, seed: int, num_codes: int) -> list[float]:
    """Plan a song whose metadata are all known; returns when each code came."""
    metadata = SongMetadata(bpm=90, key_scale="G major", time_signature="4", duration_s=num_codes / 5)
    arrivals: list[float] = []
    request = ComposeRequest(caption=f"{CAPTION}, take {seed}", lyrics=LYRICS, metadata=metadata, seed=seed)
    async for response in LmServiceStub(channel).Compose(request):
        arrivals += [time.perf_counter()] * len(response.codes.codes)
    return arrivals
