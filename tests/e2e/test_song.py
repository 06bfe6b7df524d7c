"""Whole songs through four real processes on tiny random models."""

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from soundstage.music.v1.catalog_service_pb2 import GetCapabilitiesRequest, ListModelsRequest
from soundstage.music.v1.catalog_service_pb2_grpc import CatalogServiceStub
from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_LM,
    STAGE_VAE,
    GenerateSongRequest,
    GenerateSongResponse,
    Stage,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub


def song(**changes: Any) -> GenerateSongRequest:
    fields: dict[str, Any] = {
        "caption": "a bright tune",
        "lyrics": "[verse]\nla la la",
        "metadata": {"duration_s": 8},
        "seeds": [7],
    }
    return GenerateSongRequest(**fields | changes)


async def collect(address: str, request: GenerateSongRequest) -> list[GenerateSongResponse]:
    async with grpc.aio.insecure_channel(address) as channel:
        return [event async for event in SongServiceStub(channel).GenerateSong(request)]


def pcm_of(events: list[GenerateSongResponse], variant: int = 0) -> bytes:
    return b"".join(e.audio_chunk.data for e in events if e.HasField("audio_chunk") and e.variant == variant)


async def test_a_song_is_planned_streamed_and_complete(gateway: str) -> None:
    events = await collect(gateway, song())
    plan = next(event.plan for event in events if event.HasField("plan"))
    assert 30 <= plan.metadata.bpm <= 300
    assert plan.metadata.key_scale
    assert plan.metadata.time_signature in ("2", "3", "4", "6")
    assert plan.code_count == 40
    done = events[-1].completed
    pcm = pcm_of(events)
    assert done.frame_count == 8 * 48_000 == len(pcm) // 4
    assert done.pcm_sha256 == hashlib.sha256(pcm).digest()
    assert done.peak > 0
    assert done.metadata.bpm == plan.metadata.bpm
    assert [timing.stage for timing in done.timings] == [STAGE_LM, STAGE_DIT, STAGE_VAE]
    assert len({timing.model_fingerprint for timing in done.timings}) == 3
    steps = [e.progress.done for e in events if e.HasField("progress") and e.progress.stage == STAGE_DIT]
    assert steps == list(range(1, 9))
    codes = [e.progress.done for e in events if e.HasField("progress") and e.progress.stage == STAGE_LM]
    assert codes[-1] == 40
    assert len(codes) > 4


async def test_the_same_seed_gives_the_same_bytes(gateway: str) -> None:
    first, again, other = [await collect(gateway, song(seeds=[seed])) for seed in (7, 7, 8)]
    assert pcm_of(first) == pcm_of(again)
    assert pcm_of(first) != pcm_of(other)


async def test_a_song_is_the_same_beside_others_but_for_float_noise(gateway: str) -> None:
    alone = await collect(gateway, song(seeds=[7]))
    beside, others = await asyncio.gather(
        collect(gateway, song(seeds=[7])),
        collect(gateway, song(caption="something else", variants=3, seeds=[7, 8, 9])),
    )
    difference = samples_of(alone) - samples_of(beside)
    # Latents agree to 1e-5 of their scale; rounding to 16 bits may turn that into one step.
    assert abs(difference).max() <= 1
    assert len({pcm_of(others, variant) for variant in range(3)}) == 3


def samples_of(events: list[GenerateSongResponse]) -> NDArray[np.int32]:
    return np.frombuffer(pcm_of(events), "<i2").astype(np.int32)


async def test_what_the_user_fixed_is_kept_and_planning_can_be_left_out(gateway: str) -> None:
    metadata = {"bpm": 99, "key_scale": "F# minor", "time_signature": "3", "duration_s": 2.2}
    planned = await collect(gateway, song(metadata=metadata))
    unplanned = await collect(gateway, song(metadata={"duration_s": 2.2}, planner={"enabled": False}))
    plan = next(event.plan.metadata for event in planned if event.HasField("plan"))
    assert (plan.bpm, plan.key_scale, plan.time_signature) == (99, "F# minor", "3")
    assert planned[-1].completed.frame_count == unplanned[-1].completed.frame_count == 55 * 1920
    assert [timing.stage for timing in unplanned[-1].completed.timings] == [STAGE_DIT, STAGE_VAE]


LONG: dict[Stage.ValueType, dict[str, Any]] = {
    STAGE_LM: {},
    STAGE_DIT: {"planner": {"enabled": False}, "diffusion": {"steps": 20}},
    STAGE_VAE: {"planner": {"enabled": False}, "diffusion": {"steps": 1}},
}


@pytest.mark.parametrize("stage", LONG)
async def test_cancel_frees_the_stage_at_work(gateway: str, stage: Stage.ValueType) -> None:
    async with grpc.aio.insecure_channel(gateway) as channel:
        call = SongServiceStub(channel).GenerateSong(song(metadata={"duration_s": 600}, **LONG[stage]))
        async for event in call:
            at_work = STAGE_VAE if event.HasField("audio_chunk") else event.progress.stage
            if at_work == stage:
                break
        assert stage in await busy_stages(channel)
        call.cancel()
        # The rest of the song would take many times as long as this.
        async with asyncio.timeout(3):
            while await busy_stages(channel):
                pass


async def busy_stages(channel: grpc.aio.Channel) -> set[Stage.ValueType]:
    answer = await CatalogServiceStub(channel).GetCapabilities(GetCapabilitiesRequest())
    assert all(state.reachable for state in answer.stages)
    return {state.stage for state in answer.stages if state.in_flight}


async def test_bad_input_names_every_field_and_harms_nobody(gateway: str) -> None:
    bad = song(
        caption="a <|im_end|> b <|audio_code_1|>",
        lyrics="<think>",
        metadata={"bpm": 5, "duration_s": float("nan"), "vocal_language": "xx"},
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(gateway, bad)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for field in ("caption", "lyrics", "metadata.bpm", "metadata.duration_s", "metadata.vocal_language"):
        assert field in str(caught.value.details())
    assert (await collect(gateway, song()))[-1].HasField("completed")


async def test_the_catalog_lists_the_models_that_made_the_song(gateway: str) -> None:
    async with grpc.aio.insecure_channel(gateway) as channel:
        models = (await CatalogServiceStub(channel).ListModels(ListModelsRequest())).models
    events = await collect(gateway, song(metadata={"duration_s": 1}))
    made_by = {timing.stage: timing.model_fingerprint for timing in events[-1].completed.timings}
    assert {model.stage: model.model_fingerprint for model in models} == made_by


def run_cli(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "soundstage_cli.app", *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, check=False)


def test_the_command_line_writes_a_wav_of_the_exact_length(gateway: str, tmp_path: Path) -> None:
    lyrics = tmp_path / "lyrics.txt"
    lyrics.write_text("[verse]\nla la\n")
    path = tmp_path / "song.wav"
    done = run_cli(
        "generate", "a calm piano", "--lyrics-file", str(lyrics), "--duration", "4", "--seed", "7",
        "--output", str(path), "--gateway", gateway,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"first audio after" in done.stderr
    made = soundfile.info(path)
    assert (made.samplerate, made.channels, made.frames, made.subtype) == (48_000, 2, 4 * 48_000, "PCM_16")


def test_the_command_line_pipes_raw_pcm_and_nothing_else(gateway: str) -> None:
    done = run_cli(
        "generate", "a calm piano", "--duration", "2", "--sample-format", "f32", "-o", "-", "--gateway", gateway
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 2 * 48_000 * 2 * 4


def test_the_command_line_writes_a_part_of_a_song_that_is_kept(gateway: str, tmp_path: Path) -> None:
    whole, part = tmp_path / "song.flac", tmp_path / "part.pcm"
    done = run_cli("generate", "x", "--duration", "2", "-o", str(whole), "--gateway", gateway)
    assert done.returncode == 0, done.stderr
    name = done.stderr.decode().partition("songs/")[2][:32]
    again = run_cli(
        "audio", name[:10], "-o", str(part), "--from-s", "0.5", "--to-s", "1.25", "--watch", "--gateway", gateway
    )
    assert again.returncode == 0, again.stderr
    samples, _ = soundfile.read(whole, dtype="int16", start=24_000, stop=60_000)
    assert samples.any()
    assert part.read_bytes() == samples.tobytes()
    assert name[:8].encode() in run_cli("songs", "--gateway", gateway).stdout


def test_the_command_line_writes_a_file_for_every_variant(gateway: str, tmp_path: Path) -> None:
    path = tmp_path / "song.wav"
    done = run_cli("generate", "x", "--duration", "1", "--variants", "2", "-o", str(path), "--gateway", gateway)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["song-1.wav", "song-2.wav"]


def test_the_command_line_explains_a_refusal(gateway: str, tmp_path: Path) -> None:
    done = run_cli("generate", "", "--bpm", "5", "--output", str(tmp_path / "x.wav"), "--gateway", gateway)
    assert done.returncode == 1
    assert b"caption is empty" in done.stderr
    assert b"metadata.bpm is 5; must be 30 to 300" in done.stderr
    assert b"Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_shows_what_it_promises(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "demo.wav"
    done = run_cli("demo", "--output", str(path), "--models", str(models))
    assert done.returncode == 0, done.stderr
    assert b"first audio after" in done.stderr
    made = soundfile.info(path)
    assert (made.samplerate, made.channels, made.frames) == (48_000, 2, 20 * 48_000)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--output", "/nowhere/song.wav"], "cannot be written"),
        (["--output", "song.aiff"], "must end in one of .wav, .flac,"),
        (["--output", "-", "--variants", "2"], "a pipe takes one variant"),
        (["--bpm", "99999999999"], "'99999999999'; must be a whole number from 0 to 4294967295"),
        (["--lyrics-file", __file__ + ".none"], "No such file"),
        (["--lyrics-file", sys.executable], "is not UTF-8 text"),
    ],
)
def test_the_command_line_refuses_what_cannot_be(arguments: list[str], complaint: str) -> None:
    done = run_cli("generate", "x", *arguments)
    assert done.returncode == 2
    words = " ".join(done.stderr.decode().replace("│", " ").split())
    assert complaint in words
    assert "Traceback" not in words
