"""Files on their way to the gateway."""

from collections.abc import Iterator
from pathlib import Path

import typer

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage_cli.channel import open_channel

_PART_BYTES = 1 << 20
_MAX_FILE_BYTES = 256 << 20


async def upload(target: str, path: Path) -> str:
    """Send a file to the gateway at `target` and return its asset's name; raises grpc.aio.AioRpcError."""
    async with open_channel(target) as channel:
        return (await AudioServiceStub(channel).UploadAudio(_parts(path))).asset


def check_file(hint: str, path: Path) -> None:
    """Refuse a file that cannot be sent."""
    try:
        with path.open("rb"):
            size_bytes = path.stat().st_size
    except OSError as error:
        raise typer.BadParameter(f"is {str(path)!r}, which cannot be read: {error}", param_hint=hint) from error
    if size_bytes > _MAX_FILE_BYTES:
        raise typer.BadParameter(f"is {size_bytes} bytes long; at most {_MAX_FILE_BYTES}", param_hint=hint)


def _parts(path: Path) -> Iterator[UploadAudioRequest]:
    with path.open("rb") as file:
        while data := file.read(_PART_BYTES):
            yield UploadAudioRequest(data=data)
