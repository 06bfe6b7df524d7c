"""A planner process to be measured."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path


class StageDiedError(Exception):
    """The planner ended before it was ready, or runs another engine than the one to be measured."""


@asynccontextmanager
async def run_stage(
    folder: Path, *, engine: str, device: str, dtype: str, threads: int, max_songs: int, python: Path | None
) -> AsyncGenerator[str, None]:
    """Run a planner until the block ends; gives its address. Raises StageDiedError."""
    options = {
        "model": str(folder),
        "engine": engine,
        "dtype": dtype,
        "device": device,
        "max-in-flight": str(max_songs),
        "port": "0",
        "log-format": "json",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",  # else vLLM leaves a core to itself
    }
    process = await asyncio.create_subprocess_exec(
        str(python or sys.executable), "-m", "soundstage_lm", *flags, stderr=PIPE, env=environment
    )
    reader = None
    try:
        port = await _wait_until_ready(process, engine)
        reader = asyncio.create_task(_drain(process))
        yield f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        if reader is not None:
            await reader


async def _wait_until_ready(process: asyncio.subprocess.Process, engine: str) -> int:
    assert process.stderr is not None
    port, lines = 0, deque[str](maxlen=20)
    async for raw in process.stderr:
        lines.append(raw.decode(errors="replace").rstrip())
        try:
            event = json.loads(lines[-1])
        except ValueError:
            continue
        match event:
            case {"event": "engine_chosen", "engine": str(chosen), "why": why} if chosen != engine:
                raise StageDiedError(f"the planner runs on {chosen}, not on {engine}: {why}")
            case {"event": "vllm_did_not_start", "why": why}:
                raise StageDiedError(f"vllm did not start: {why}")
            case {"event": "listening", "port": int(found)}:
                port = found
            case {"event": "ready"}:
                return port
            case _:
                pass
    raise StageDiedError("the planner ended before it was ready:\n" + "\n".join(lines))


async def _drain(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    while await process.stderr.read(1 << 16):
        pass
