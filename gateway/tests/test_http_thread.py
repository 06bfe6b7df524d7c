"""Work on another thread is waited for, whoever cancels it and how often."""

import asyncio
import threading

import pytest

from soundstage_gateway.http.thread import run_to_end


async def test_work_that_is_cancelled_twice_is_done_when_its_caller_goes_on() -> None:
    begun, may_go_on, is_done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_go_on.wait(10)
        is_done.set()

    caller = asyncio.create_task(run_to_end(work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):
        caller.cancel()
        await asyncio.wait({caller}, timeout=0.05)
    assert not caller.done()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert is_done.is_set()
