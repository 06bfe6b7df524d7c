"""Files on their way to the gateway."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import typer

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage_cli.channel import open_channel
from soundstage_runtime.errors import read_details

_PART_BYTES = 1 << 20
_MAX_FILE_BYTES = 256 << 20

SentFile = tuple[str, Path]  # the option that it came by, and where it lies


async def upload(target: str, hint: str, path: Path) -> str:
    """Send a file, which came by the option `hint`, to the gateway at `target` and return its asset's name.

    Raises BadParameter when the gateway refuses the file, and grpc.aio.AioRpcError.
    """
    async with open_channel(target) as channel:
        try:
            return (await AudioServiceStub(channel).UploadAudio(_parts(path))).asset
        except grpc.aio.AioRpcError as error:
            for violation in read_details(error).violations:
                message = f"is {str(path)!r}: the file {violation.description}"
                raise typer.BadParameter(message, param_hint=hint) from error
            raise


@contextmanager
def naming_files(sent: Mapping[str, SentFile]) -> Generator[None]:
    """Say what the gateway refuses of assets of files that were sent, and of their options; raises BadParameter."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        for violation in read_details(error).violations:
            for asset, (hint, path) in sent.items():
                if asset in violation.description:
                    message = violation.description.replace(asset, repr(str(path)))
                    raise typer.BadParameter(message, param_hint=hint) from error
        raise


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
