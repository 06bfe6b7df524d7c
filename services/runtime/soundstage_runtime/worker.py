"""One thread per device: the event loop never blocks, and device work never overlaps.

All of a process's heavy torch work belongs on it, loading too. Each thread that ever ran a parallel kernel keeps a team
of OpenMP threads, and as soon as there are more of them than cores, GNU's OpenMP no longer spins at its barriers: every
kernel then waits for the scheduler, and small ones take up to eight times as long.
"""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs functions one after another on its own thread, in the order they were asked for."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Await `work`. When the awaiting task is cancelled, work that has not begun is dropped."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: context.run(work, *args, **kwargs))

    def close(self) -> None:
        """Drop what has not begun and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)
