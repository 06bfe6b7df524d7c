"""The process as it is deployed: `python -m soundstage_vae`."""

import asyncio
import json
import signal
import sys
from pathlib import Path

import grpc.aio

from soundstage.stage.v1.stage_service_pb2 import DescribeRequest
from soundstage.stage.v1.stage_service_pb2_grpc import StageServiceStub
from soundstage_vae.codec import Codec


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "soundstage_vae", *arguments, stderr=asyncio.subprocess.PIPE
    )


async def wait_for_event(process: asyncio.subprocess.Process, event: str) -> dict[str, object]:
    assert process.stderr is not None
    async with asyncio.timeout(120):
        async for line in process.stderr:
            if line.startswith(b"{") and (record := json.loads(line))["event"] == event:
                return record
    raise AssertionError(f"the process ended without {event}")


async def test_serves_what_it_loaded_until_it_is_told_to_stop(tiny_vae: Path, codec: Codec) -> None:
    process = await start("--model", str(tiny_vae), "--port", "0", "--log-format", "json", "--max-in-flight", "3")
    port = (await wait_for_event(process, "ready"))["port"]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        described = await StageServiceStub(channel).Describe(DescribeRequest())
    assert (described.stage, described.max_in_flight, described.in_flight) == ("vae", 3, 0)
    assert [(m.variant, m.dtype, m.model_fingerprint) for m in described.models] == [
        ("oobleck", "float32", codec.fingerprint)
    ]
    process.send_signal(signal.SIGTERM)
    await wait_for_event(process, "stopped")
    assert await process.wait() == 0


async def test_leaves_with_one_line_when_there_is_no_checkpoint(tmp_path: Path) -> None:
    process = await start("--model", str(tmp_path))
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert errors.decode().count("\n") == 1
    assert errors.decode().startswith(f"soundstage_vae: {tmp_path}/config.json is missing")
