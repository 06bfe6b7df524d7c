"""No file harms the gateway: it is refused in bounded time and memory, and the next one is decoded."""

import asyncio
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc
import grpc.aio
import httpx2
import numpy as np
import pytest

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage_gateway.audio_decoder import AudioDecoder
from soundstage_gateway.audio_file import MEMORY_LIMIT_BYTES
from soundstage_runtime.errors import InvalidRequestError, read_details

from . import bad_files
from .conftest import Deploy, Deployment
from .files import m4a, sound_file, tone, words

# From a process of its own: a child counts what its parent had in memory as its own.
WEIGH = """
import resource, subprocess, sys, tempfile
with tempfile.TemporaryFile() as file:
    file.write(sys.stdin.buffer.read())
    file.seek(0)
    subprocess.run([sys.executable, "-m", "soundstage_gateway.audio_file"], stdin=file)
print("\\n%d" % (resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024), end="")
"""
READ_ALL = """
import io, pickle, resource, sys
from soundstage_gateway.audio_file import MEMORY_LIMIT_BYTES, FileRefusedError, read_audio_file

resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
for data in pickle.load(sys.stdin.buffer):
    try:
        print(len(read_audio_file(io.BytesIO(data)).samples))
    except FileRefusedError as error:
        print(ascii(str(error)))
"""
SHORT = [
    sound_file(words(4_800), 48_000, "WAV"),
    sound_file(tone(0.1, 44_100, 2), 44_100, "WAV", "FLOAT"),
    sound_file(words(9_600), 48_000, "FLAC"),
    sound_file(tone(0.3, 44_100), 44_100, "MP3"),
    sound_file(tone(0.3, 44_100, 2), 44_100, "OGG", "VORBIS"),
    sound_file(tone(0.3, 48_000, 2), 48_000, "OGG", "OPUS"),
    m4a(tone(0.3, 48_000, 2), 48_000, codec="aac"),
    m4a(tone(0.1, 48_000, 2), 48_000),
]


def mutant(seed: int) -> bytes:
    """Noise, or a file with other bytes, with other bits, with a hole, or with another file's end."""
    random = np.random.default_rng(seed)
    data, other = (bytearray(SHORT[number]) for number in random.integers(len(SHORT), size=2))
    # Headers are short and matter most.
    places = random.integers(200 if random.random() < 0.5 else len(data), size=random.integers(1, 30))
    first, last = sorted(random.integers(len(data), size=2))
    match int(random.integers(5)):
        case 0:
            return random.bytes(int(random.integers(5_000)))
        case 1:
            for place in places:
                data[place] = random.integers(256)
        case 2:
            for place in places:
                data[place] ^= 1 << random.integers(8)
        case 3:
            del data[first:last]
        case _:
            data[first:] = other[random.integers(len(other)) :]
    return bytes(data)


async def upload(deployment: Deployment, data: bytes) -> float:
    parts = (UploadAudioRequest(data=data[first : first + 500_000]) for first in range(0, len(data), 500_000))
    return (await AudioServiceStub(deployment.channel).UploadAudio(parts)).duration_s


async def test_bad_files_are_refused_over_grpc_and_the_next_one_is_decoded(deploy: Deploy) -> None:
    refused = {
        b"RIFF was here": "cannot be decoded",
        b"#EXTM3U\nfile:///etc/passwd\n": "cannot be decoded",
        bad_files.WAV[:-1000]: "ends too early",
        sound_file(words(4_800, 100), 48_000, "WAV"): "has 100 channels",
        bad_files.with_rate(2_000_000_000): "has 2000000000 samples a second",
        sound_file(np.full((4_800, 1), np.nan), 48_000, "WAV", "FLOAT"): "holds NaN or infinity",
        bad_files.silence(3 * 3600): "is 10800 s long",
        bad_files.video(): "holds no audio",
        bad_files.with_samples(40_000_000): "is 0 s long",
        bad_files.NESTED_BOXES: "cannot be decoded",
    }
    async with deploy() as deployment:
        for data, words_of_it in refused.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await upload(deployment, data)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            [violation] = read_details(caught.value).violations
            assert (violation.field, words_of_it in violation.description) == ("data", True), violation
        for seed in range(10):
            try:
                await upload(deployment, mutant(seed))
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await upload(deployment, bad_files.with_cover(bad_files.FLAC)) == 1


async def test_bad_files_are_refused_over_http(deploy: Deploy) -> None:
    refused = {
        b"": "is empty",
        b"<html>": "cannot be decoded",
        bad_files.WHOLE["opus"][:-1]: "ends too early",
        bad_files.with_samples(40_000_000): "is 0 s long",
    }
    async with deploy() as deployment, httpx2.AsyncClient(base_url=deployment.http, timeout=30) as http:
        for data, words_of_it in refused.items():
            answer = await http.post("/v1/assets", content=data)
            [violation] = answer.json()["error"]["violations"]
            assert (answer.status_code, violation["field"]) == (400, "data")
            assert words_of_it in violation["description"]
        assert (await http.post("/v1/assets", content=bad_files.FLAC)).status_code == 201


def test_two_thousand_mutants_are_read_or_refused() -> None:
    mutants = pickle.dumps([mutant(seed) for seed in range(2_000)])
    answer = subprocess.run([sys.executable, "-c", READ_ALL], input=mutants, capture_output=True, check=False)
    assert answer.returncode == 0, answer.stderr.decode()[-2_000:]
    outcomes = answer.stdout.decode().splitlines()
    assert len(outcomes) == 2_000
    assert min(sum(outcome.isdigit() for outcome in outcomes), sum("; " in outcome for outcome in outcomes)) > 300


@pytest.mark.parametrize(
    "data",
    [
        bad_files.with_samples(10**7),
        bad_files.with_samples(8 * 10**7),
        bad_files.told_to_be(bad_files.silence(10_800), 0),
    ],
    ids="table large-table three-hours".split(),
)
def test_a_small_file_takes_no_more_memory_than_the_limit(data: bytes) -> None:
    weighed = subprocess.run([sys.executable, "-c", WEIGH], input=data, capture_output=True, check=True)
    answer, _, taken_bytes = weighed.stdout.rpartition(b"\n")
    assert answer.startswith(b'{"refused": ')
    code_bytes = 80 << 20  # files that are only mapped do not count for the limit
    assert int(taken_bytes) < MEMORY_LIMIT_BYTES + code_bytes


async def refusal(decoder: AudioDecoder) -> str:
    with tempfile.TemporaryFile() as file, pytest.raises(InvalidRequestError) as caught:
        await decoder.decode(file)
    return caught.value.message


async def test_a_decoder_that_breaks_or_hangs_is_ended_and_the_file_refused() -> None:
    assert "breaks the decoder" in await refusal(AudioDecoder([sys.executable, "-c", "import os; os.abort()"]))
    assert "keeps it busy" in await refusal(AudioDecoder(["sleep", "1000"], time_limit_s=0.1))


async def test_a_decoder_that_cannot_run_is_no_fault_of_the_file() -> None:
    decoder = AudioDecoder([sys.executable, "-m", "no_such_module"])
    with tempfile.TemporaryFile() as file, pytest.raises(RuntimeError, match="No module named no_such_module"):
        await decoder.decode(file)


async def test_a_cancelled_decoding_ends_its_process_and_lets_the_next_one_begin(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    decoder = AudioDecoder(["sh", "-c", f"echo $$ > {begun}; exec sleep 1000"])
    with tempfile.TemporaryFile() as file:
        for _ in range(2):
            decoding = asyncio.create_task(decoder.decode(file))
            number = int(await asyncio.to_thread(begun.read_text))
            decoding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await decoding
            with pytest.raises(ProcessLookupError):
                os.kill(number, 0)
