"""Diffusers' pipeline in a process of its own, with its memory as glibc gives it there, or with all of it kept."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from typing import Any, Self

import torch
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline

from soundstage_cli.bench.clock import MOST_KEPT_BYTES
from soundstage_cli.bench.dit import compile_layers
from soundstage_cli.stack import die_with_parent
from soundstage_device.budget import keep_freed_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What to load, and how; `is_compiled` is of its transformer."""

    folder: str
    device: str
    dtype: str
    threads: int
    keeps_memory: bool = False
    is_compiled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The song to make, but for its length and seed."""

    caption: str
    lyrics: str
    steps: int


class Pipeline:
    """A context in which the process runs; it is started, and loads, at the first song."""

    def __init__(self, setup: Setup, task: Task) -> None:
        self._setup, self._task = setup, task
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(cancel_futures=True)

    async def make(self, duration_s: int, seed: int) -> AsyncIterator[int]:
        """Make a song, and yield the number of its audio frames when all of it is there. Raises what diffusers does."""
        loop = asyncio.get_running_loop()
        yield await loop.run_in_executor(self._process, _make, self._setup, self._task, duration_s, seed)


def _make(setup: Setup, task: Task, duration_s: int, seed: int) -> int:
    audio = _load(setup)(
        prompt=task.caption,
        lyrics=task.lyrics,
        audio_duration=float(duration_s),
        num_inference_steps=task.steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        return_dict=False,
    )[0]
    return int(audio.float().cpu().shape[-1])  # where ours is when it comes


@cache
def _load(setup: Setup) -> Any:
    die_with_parent()
    if setup.keeps_memory:
        keep_freed_memory(MOST_KEPT_BYTES)
    torch.set_num_threads(setup.threads)
    loaded: Any = AceStepPipeline.from_pretrained(setup.folder, dtype=getattr(torch, setup.dtype))
    pipe = loaded.to(setup.device)
    pipe.set_progress_bar_config(disable=True)
    if setup.is_compiled:
        compile_layers(pipe.transformer)
    return pipe
