"""Connections that ask for nothing, or do not finish asking, are ended."""

import asyncio

import pytest

from .conftest import Deploy
from .web import client


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"])
async def test_a_request_that_does_not_become_whole_is_left(deploy: Deploy, begun: bytes) -> None:
    async with deploy(idle_timeout_s=1) as deployment:
        reader, writer = await asyncio.open_connection("127.0.0.1", deployment.door.port)
        writer.write(begun)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()


async def test_a_second_request_that_does_not_become_whole_is_left(deploy: Deploy) -> None:
    async with deploy(idle_timeout_s=1) as deployment:
        reader, writer = await asyncio.open_connection("127.0.0.1", deployment.door.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"}")
        async with asyncio.timeout(5):
            while not reader.at_eof():
                writer.write(b"G")  # each byte would keep a connection that is between two requests
                await asyncio.sleep(0.05)
                if await _is_over(reader):
                    break
        writer.close()


async def _is_over(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(0.01):
            return await reader.read() == b""
    except (TimeoutError, ConnectionError):
        return reader.at_eof()


async def test_an_answer_may_take_longer_than_a_request(deploy: Deploy) -> None:
    async with deploy(idle_timeout_s=1) as deployment, client(deployment) as http:
        made = await http.post("/v1/songs", json={"caption": "a", "metadata": {"durationS": 4}})
        async with http.stream("GET", f"{made.headers['location']}/audio.wav?max_buffer_s=1") as answer:
            data = b"".join([piece async for piece in answer.aiter_raw()])
    assert len(data) == 44 + 4 * 4 * 48_000


async def test_a_head_without_an_end_is_refused(deploy: Deploy) -> None:
    async with deploy() as deployment:
        reader, writer = await asyncio.open_connection("127.0.0.1", deployment.door.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 70_000)
        async with asyncio.timeout(5):
            assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()


async def test_connections_beyond_the_limit_are_refused(deploy: Deploy) -> None:
    async with deploy(max_connections=2) as deployment, client(deployment) as http:
        others = [await asyncio.open_connection("127.0.0.1", deployment.door.port) for _ in range(2)]
        assert (await http.get("/healthz")).status_code == 503
        for _, writer in others:
            writer.close()
