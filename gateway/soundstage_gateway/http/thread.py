"""Work on other threads."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def run_to_end(function: Callable[[], T]) -> T:
    """Run a function on another thread, to its end though the caller is cancelled, once or more."""
    work = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(work)
    finally:
        while not work.done():
            with suppress(asyncio.CancelledError):  # the first is on its way
                await asyncio.wait({work})
