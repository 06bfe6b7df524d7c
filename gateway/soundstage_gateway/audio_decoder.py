"""A decoder of clients' files, which may harm it: each is decoded in a process of its own."""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, BinaryIO, Final, NoReturn

import numpy as np

from soundstage_gateway.audio_file import TIME_LIMIT_S, Recording
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import CHANNELS

_PROGRAM: Final = (sys.executable, "-m", "soundstage_gateway.audio_file")
_BREAKS: Final = "breaks the decoder, or keeps it busy for too long; write the file anew"


class AudioDecoder:
    """Decodes one file after another with a program that does as audio_file's main.

    FFmpeg believes what files say of their tables, and takes gigabytes for some kilobytes.
    """

    def __init__(self, program: Sequence[str] = _PROGRAM, *, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._program = program
        self._time_limit_s = time_limit_s
        self._turn = asyncio.Lock()

    async def decode(self, file: BinaryIO) -> Recording:
        """Decode a file on disk, see read_audio_file; raises InvalidRequestError. Cancelled, it ends the process."""
        async with self._turn:
            with tempfile.TemporaryFile() as answer:
                running = asyncio.create_task(self._run(file, answer))
                try:
                    await asyncio.shield(running)
                finally:
                    # However often the caller is cancelled, the process is ended and waited for.
                    running.cancel()
                    await asyncio.wait({running})
                answer.seek(0)
                return await asyncio.to_thread(_read, answer)

    async def _run(self, file: BinaryIO, answer: IO[bytes]) -> None:
        file.seek(0)
        starting = asyncio.create_task(
            asyncio.create_subprocess_exec(
                *self._program,
                stdin=file,
                stdout=answer,
                stderr=asyncio.subprocess.PIPE,
                # On large machines the memory of threads that nobody needs would be more than the limit.
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        )
        try:
            async with asyncio.timeout(self._time_limit_s):
                _, errors = await (await asyncio.shield(starting)).communicate()
        except TimeoutError:
            _refuse(_BREAKS)
        finally:
            process = await starting
            if process.returncode is None:
                process.kill()
            while process.returncode is None:  # at once, but a closing loop cancels the wait for it too
                with suppress(asyncio.CancelledError):
                    await process.wait()
        if process.returncode < 0:  # ended by a signal
            _refuse(_BREAKS)
        if process.returncode:
            raise RuntimeError(f"the decoder ended with status {process.returncode}: {errors.decode()}")


def _read(answer: IO[bytes]) -> Recording:
    found: dict[str, Any] = json.loads(answer.readline())
    if "refused" in found:
        _refuse(found["refused"])
    samples = np.frombuffer(answer.read(), np.float32)
    return Recording(samples=samples.reshape(-1, CHANNELS), **found)


def _refuse(description: str) -> NoReturn:
    raise InvalidRequestError([Violation(field="data", description=description)])
