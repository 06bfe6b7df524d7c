"""Work on other threads."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_to_end(function: Callable[[], T]) -> T:
    """Run a function on another thread, to its end though the caller is cancelled."""
    work = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(work)
    finally:
        await asyncio.wait({work})
