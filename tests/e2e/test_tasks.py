"""Songs of every task, from real files, through four real processes on tiny random models."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage.music.v1.song_service_pb2 import AlignLyricsRequest, GenerateSongRequest
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage_runtime.errors import read_details

WORDS = np.random.default_rng(0).integers(-32_768, 32_768, (2 * 48_000, 2), np.int16)


def tone(duration_s: float, rate_hz: int) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(duration_s * rate_hz)) / rate_hz)).astype(np.float32)


def sound_file(samples: NDArray[Any], rate_hz: int, file_format: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=file_format)
    return buffer.getvalue()


FLAC = sound_file(WORDS, 48_000, "FLAC")
MP3 = sound_file(tone(1.5, 44_100), 44_100, "MP3")


@pytest.fixture(scope="module")
def base_gateway(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a gateway whose diffusion model can do every task, and whose codec works in short windows."""
    log = tmp_path_factory.mktemp("up-base") / "log"
    command = [sys.executable, "-m", "soundstage_cli.app", "up", "--models", str(models / "original"), "--port", "0"]
    command += ["--dit", str(models / "original" / "acestep-v15-base")]
    environment = os.environ | {"SOUNDSTAGE_VAE_WINDOW_FRAMES": "32"}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as up,
    ):
        assert up.stdout is not None
        line = up.stdout.readline()
        try:
            assert line.startswith("soundstage is ready at "), log.read_text()
            yield line.split()[-1]
        finally:
            up.terminate()
            up.wait(60)


async def upload(channel: grpc.aio.Channel, data: bytes) -> str:
    parts = (UploadAudioRequest(data=data[first : first + 500_000]) for first in range(0, len(data), 500_000))
    return (await AudioServiceStub(channel).UploadAudio(parts)).asset


async def make(address: str, source: bytes | None = None, references: tuple[bytes, ...] = (), **fields: Any) -> bytes:
    """Upload the files, make a song of them, and return its PCM."""
    values: dict[str, Any] = {"caption": "a bright tune", "seeds": [7], "diffusion": {"steps": 3}}
    request = GenerateSongRequest(**values | fields)
    async with grpc.aio.insecure_channel(address) as channel:
        if source is not None:
            request.source = await upload(channel, source)
        request.references.extend([await upload(channel, reference) for reference in references])
        events = [event async for event in SongServiceStub(channel).GenerateSong(request)]
    assert events[-1].HasField("completed")
    return b"".join(event.audio_chunk.data for event in events)


WINDOW = {"start_s": 0.5, "end_s": 1.2}
TASKS: dict[str, dict[str, Any]] = {
    "cover": {"task": {"cover": {}}, "source": MP3},
    "cover-switched": {"task": {"cover": {"strength": 0.5, "noise_strength": 0.25}}, "source": FLAC},
    "cover-latents": {"task": {"cover": {"from_latents": True}}, "source": FLAC},
    "cover-codes": {"task": {"cover": {}}, "codes": list(range(10))},
    "repaint-conservative": {"task": {"repaint": WINDOW | {"mode": "REPAINT_MODE_CONSERVATIVE"}}, "source": FLAC},
    "repaint-balanced": {"task": {"repaint": WINDOW}, "source": FLAC},
    "repaint-aggressive": {"task": {"repaint": WINDOW | {"mode": "REPAINT_MODE_AGGRESSIVE"}}, "source": FLAC},
    "outpaint": {"task": {"repaint": {"start_s": -0.4, "end_s": 0.5}}, "source": FLAC},
    "extend": {"task": {"repaint": {"start_s": 2, "end_s": 2.5}}, "source": FLAC},
    "edit": {"task": {"edit": {"source_caption": "a dull tune", "averages": 2}}, "source": FLAC},
    "edit-codes": {
        "task": {"edit": {"source_caption": "a dull tune", "context": "EDIT_CONTEXT_CODES"}},
        "source": FLAC,
    },
    "edit-latents": {
        "task": {"edit": {"source_caption": "a dull tune", "context": "EDIT_CONTEXT_LATENTS"}},
        "source": FLAC,
    },
    "retake": {
        "diffusion": {"steps": 3, "retake": {"seed": 3, "variance": 0.3}},
        "planner": {"enabled": False},
        "metadata": {"duration_s": 1},
    },
    "references": {
        "references": (MP3,),
        "planner": {"enabled": False},
        "metadata": {"duration_s": 1},
    },
    "silence": {"task": {"cover": {}}, "source": sound_file(np.zeros(48_000, np.float32), 48_000, "WAV")},
}
BASE_TASKS: dict[str, dict[str, Any]] = {
    "extract": {"task": {"extract": {"track": "TRACK_DRUMS"}}, "source": MP3, "caption": ""},
    "lego": {"task": {"lego": {"track": "TRACK_BASS"}}, "source": FLAC},
    "lego-region": {"task": {"lego": {"track": "TRACK_BASS", "start_s": 0.5, "end_s": 1}}, "source": FLAC},
    "complete": {"task": {"complete": {"tracks": ["TRACK_DRUMS", "TRACK_BASS"]}}, "source": FLAC},
}
ALL_TASKS = TASKS | BASE_TASKS
SECONDS = {"cover": 1.48, "extract": 1.48, "outpaint": 2.4, "extend": 2.48, "retake": 1, "references": 1, "silence": 1}
MADE: dict[str, bytes] = {}


async def remembered(address: str, name: str) -> bytes:
    """Make a task's song, once for all tests."""
    if name not in MADE:
        MADE[name] = await make(address, **ALL_TASKS[name])
    return MADE[name]


# Half a minute of reference is heard twice there.
SLOW = {"references": pytest.mark.soak}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in ALL_TASKS])
async def test_the_same_seed_gives_the_same_bytes(base_gateway: str, name: str) -> None:
    song = await remembered(base_gateway, name)
    assert len(song) == round(SECONDS.get(name, 2) * 48_000) * 4
    assert np.frombuffer(song, "<i2").any()
    assert await make(base_gateway, **ALL_TASKS[name]) == song


async def test_another_seed_gives_another_song(base_gateway: str) -> None:
    assert await make(base_gateway, **TASKS["cover"], seeds=[8]) != await remembered(base_gateway, "cover")


@pytest.mark.parametrize(
    ("name", "able"),
    [("extract", "base and xl-base"), ("lego", "base, xl-base and sft-stems"), ("complete", "base and xl-base")],
)
async def test_a_task_that_a_turbo_model_cannot_do_names_the_variants_that_can(
    gateway: str, name: str, able: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await make(gateway, **BASE_TASKS[name])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    [violation] = read_details(caught.value).violations
    assert violation.field == f"task.{name}"
    assert violation.description == f"is for models of the variants {able}; this one is turbo"


@pytest.mark.parametrize(
    ("name", "source_frames", "song_frame"),
    [
        ("repaint-conservative", [(0, 24_000 - 2400), (57_600 + 2400, 96_000)], 0),
        ("repaint-balanced", [(0, 24_000 - 1200), (57_600 + 1200, 96_000)], 0),
        ("outpaint", [(24_000 + 1200, 96_000)], 19_200),
        ("extend", [(0, 96_000 - 1200)], 0),
    ],
)
async def test_outside_of_the_window_the_song_is_the_source_to_the_bit(
    base_gateway: str, name: str, source_frames: list[tuple[int, int]], song_frame: int
) -> None:
    song = np.frombuffer(await remembered(base_gateway, name), "<i2").reshape(-1, 2)
    for first, after in source_frames:
        assert np.array_equal(song[song_frame + first : song_frame + after], WORDS[first:after])


async def test_a_task_changes_what_is_made_of_the_same_seed_and_source(base_gateway: str) -> None:
    names = ("cover-switched", "cover-latents", "repaint-aggressive", "edit", "edit-codes", "edit-latents")
    songs = [await remembered(base_gateway, name) for name in names]
    assert len(set(songs)) == len(names)


async def test_references_change_the_sound(base_gateway: str) -> None:
    fields = {name: value for name, value in TASKS["references"].items() if name != "references"}
    assert await remembered(base_gateway, "references") != await make(base_gateway, **fields)


async def test_the_lyrics_of_a_song_are_aligned_line_by_line(gateway: str) -> None:
    lines = ["[verse]", "la la la", "far away", "[chorus]", "home again"]
    request = GenerateSongRequest(caption="a bright tune", lyrics="\n".join(lines), seeds=[7, 8], variants=2)
    request.planner.enabled = False
    request.metadata.duration_s = 4
    request.diffusion.steps = 2
    async with grpc.aio.insecure_channel(gateway) as channel:
        stub = SongServiceStub(channel)
        events = [event async for event in stub.GenerateSong(request)]
        song = events[0].accepted.song
        first, again, second = [
            await stub.AlignLyrics(AlignLyricsRequest(song=song, variant=variant)) for variant in (0, 0, 1)
        ]
    assert first == again
    for aligned in (first, second):
        assert [line.text for line in aligned.lines] == lines
        times = [time for line in aligned.lines for time in (line.start_s, line.end_s)]
        assert times == sorted(times)
        assert times[0] >= 0
        assert times[-1] <= 4
        assert times[-1] > times[0]
        assert 0 <= aligned.score <= 1
        assert [line.partition("]")[2] for line in aligned.lrc.splitlines()] == lines
    assert first.score != second.score


def run_cli(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "soundstage_cli.app", "generate", *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, check=False)


def test_the_command_line_repaints_a_file(gateway: str, tmp_path: Path) -> None:
    source, output = tmp_path / "source.flac", tmp_path / "song.wav"
    source.write_bytes(FLAC)
    done = run_cli(
        "a bright tune", "--task", "repaint", "--source", str(source), "--start", "0.5", "--end", "1.2",
        "--mode", "conservative", "--sampler", "heun", "--steps", "2", "-o", str(output),
        "--gateway", gateway,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    song = soundfile.read(output, dtype="int16")[0]
    assert np.array_equal(song[: 24_000 - 2400], WORDS[: 24_000 - 2400])
    assert not np.array_equal(song[24_000:57_600], WORDS[24_000:57_600])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--task", "sing"], "must be one of cover, repaint, extract, lego, complete, edit"),
        (["--task", "cover", "--start", "1"], "goes with --task repaint, lego"),
        (["--strength", "1"], "goes with --task cover, repaint"),
        (["--task", "extract", "--track", "kazoo"], "is 'kazoo'; must be one of woodwinds, brass"),
        (["--task", "lego", "--track", "bass", "--track", "drums"], "--task lego takes one"),
        (["--task", "repaint", "--mode", "bold"], "must be one of conservative, balanced, aggressive"),
        (["--sampler", "dice"], "must be one of euler, heun, sde"),
        (["--adapter", "warm:hot"], "must be a name, or a name and a number"),
        (["--task", "cover", "--source", "/nowhere.wav"], "which cannot be read"),
    ],
)
def test_the_command_line_refuses_what_does_not_fit(arguments: list[str], complaint: str) -> None:
    done = run_cli("x", *arguments)
    assert done.returncode == 2
    assert complaint in " ".join(done.stderr.decode().replace("│", " ").split())
