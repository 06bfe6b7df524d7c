"""HTTP clients, and a codec that they can watch."""

import asyncio
import io
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import av
import httpx2

from .conftest import Deployment, Steady

REQUEST: dict[str, Any] = {"caption": "a calm piano", "metadata": {"durationS": 4}, "seeds": [7]}


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
