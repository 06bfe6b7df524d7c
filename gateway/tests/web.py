"""HTTP clients, and what they can watch: a codec, and threads."""

import asyncio
import io
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import av
import httpx2

from .conftest import Deployment, Steady

REQUEST: dict[str, Any] = {"caption": "a calm piano", "metadata": {"durationS": 4}, "seeds": [7]}
JSON = {"Content-Type": "application/json"}


@asynccontextmanager
async def client(deployment: Deployment) -> AsyncGenerator[httpx2.AsyncClient, None]:
    async with httpx2.AsyncClient(base_url=deployment.http, timeout=20) as http:
        yield http


async def create(http: httpx2.AsyncClient, **changes: Any) -> str:
    """Begin a song, and return its path."""
    answer = await http.post("/v1/songs", json=REQUEST | changes)
    assert answer.status_code == 201, answer.text
    return answer.headers["location"]


async def finish(http: httpx2.AsyncClient, **changes: Any) -> str:
    """Make a song, decode it whole, and return its path."""
    path = await create(http, **changes)
    assert (await http.get(f"{path}/audio.wav")).status_code == 200
    return path


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  nothing tells when a place is free
            await asyncio.sleep(0.01)


def num_frames(data: bytes) -> int:
    with av.open(io.BytesIO(data), "r") as file:
        return sum(frame.samples for frame in file.decode(audio=0))


async def leave(http: httpx2.AsyncClient, asking: "asyncio.Task[httpx2.Response]") -> None:
    """Go away before the answer, and come back when the server has seen that."""
    asking.cancel()
    await asyncio.wait({asking})
    await http.get("/healthz")


class Held(ThreadPoolExecutor):
    """Threads that begin what they are given `when` it is time to hold it, and do it when they are let."""

    def __init__(self, when: Callable[[], bool]) -> None:
        super().__init__()
        self._when = when
        self.begun = asyncio.Event()
        self.may_go_on = threading.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def wait_and_do() -> Any:
            self.may_go_on.wait(10)
            return fn(*args, **kwargs)

        if not self._when():
            return super().submit(fn, *args, **kwargs)
        self.begun.set()
        return super().submit(wait_and_do)


@dataclass
class Gradual(Steady):
    """A codec that decodes a piece whenever it is told to."""

    allowed: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    is_left: bool = False

    async def between(self) -> None:
        try:
            await self.allowed.acquire()
        except asyncio.CancelledError:
            self.is_left = True
            raise
