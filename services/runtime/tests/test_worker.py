import asyncio
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import pytest

from soundstage_runtime.worker import Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker("test")
    yield worker
    worker.close()


async def test_work_is_done_one_at_a_time_in_the_order_it_was_asked_for(worker: Worker) -> None:
    done: list[int] = []
    at_once = threading.Lock()

    def work(number: int) -> int:
        with at_once:
            done.append(number)
            return threading.get_ident()

    threads = await asyncio.gather(*(worker.run(work, number) for number in range(50)))
    assert done == list(range(50))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_an_error_comes_back_to_who_asked(worker: Worker) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await worker.run(int, "seven")
    assert await worker.run(int, "7") == 7


async def test_work_that_has_not_begun_is_dropped_when_it_is_cancelled(worker: Worker) -> None:
    gate, begun, done = threading.Event(), threading.Event(), list[str]()

    def wait_at_the_gate() -> None:
        begun.set()
        gate.wait()
        done.append("first")

    first = asyncio.create_task(worker.run(wait_at_the_gate))
    second = asyncio.create_task(worker.run(done.append, "second"))
    third = asyncio.create_task(worker.run(done.append, "third"))
    await asyncio.to_thread(begun.wait)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    gate.set()
    await asyncio.gather(first, third)
    assert done == ["first", "third"]


async def test_the_loop_runs_on_while_work_is_done(worker: Worker) -> None:
    gate = threading.Event()
    work = asyncio.create_task(worker.run(gate.wait))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not work.done()
    gate.set()
    assert await work


async def test_work_sees_the_callers_context(worker: Worker) -> None:
    song = ContextVar("song", default="")
    song.set("songs/1")
    assert await worker.run(song.get) == "songs/1"


async def test_closing_waits_for_what_has_begun_and_drops_the_rest() -> None:
    worker = Worker("closing")
    gate, begun, done = threading.Event(), threading.Event(), list[str]()

    def wait_at_the_gate() -> None:
        begun.set()
        gate.wait()
        done.append("begun")

    first = asyncio.create_task(worker.run(wait_at_the_gate))
    second = asyncio.create_task(worker.run(done.append, "queued"))
    await asyncio.to_thread(begun.wait)
    closing = asyncio.create_task(asyncio.to_thread(worker.close))
    await asyncio.gather(second, return_exceptions=True)
    gate.set()
    await asyncio.gather(first, closing)
    assert done == ["begun"]
    assert second.cancelled()
