"""Songs made from sources and references, over real gRPC, with stages that need no model."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from soundstage.music.v1.audio_service_pb2 import UploadAudioRequest
from soundstage.music.v1.audio_service_pb2_grpc import AudioServiceStub
from soundstage.music.v1.song_service_pb2 import (
    STAGE_DIT,
    STAGE_VAE,
    GenerateSongRequest,
    GenerateSongResponse,
    StreamAudioRequest,
    WatchSongRequest,
)
from soundstage.music.v1.song_service_pb2_grpc import SongServiceStub
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32, SAMPLE_FORMAT_S16
from soundstage_gateway.audio_file import Recording
from soundstage_gateway.hearing import REFERENCE_FRAMES, reference_windows
from soundstage_gateway.sound import OpenSound
from soundstage_runtime.errors import read_details

from .conftest import Deploy, Deployment, Steady, Stuck
from .files import sound_file, tone, words

WORDS = words(5 * 48_000)  # 5 s of 16-bit noise
NOISE = sound_file(WORDS, 48_000, "FLAC", "PCM_16")
ODD = sound_file(words(7 * 48_000), 48_000, "FLAC", "PCM_16")  # five times it are 35 s: there is something to draw
SILENCE = sound_file(np.zeros((48_000, 2), np.int16), 48_000, "WAV")


async def upload(deployment: Deployment, data: bytes) -> str:
    parts = (UploadAudioRequest(data=data[first : first + 500_000]) for first in range(0, len(data), 500_000))
    return (await AudioServiceStub(deployment.channel).UploadAudio(parts)).asset


async def make(deployment: Deployment, **fields: Any) -> list[GenerateSongResponse]:
    values: dict[str, Any] = {"caption": "x", "seeds": [7]}
    request = GenerateSongRequest(**values | fields)
    return [event async for event in SongServiceStub(deployment.channel).GenerateSong(request)]


def pcm_of(events: list[GenerateSongResponse]) -> bytes:
    return b"".join(event.audio_chunk.data for event in events if event.HasField("audio_chunk"))


async def test_a_source_is_heard_by_the_codec_and_shown_to_the_diffusion(deploy: Deploy) -> None:
    async with deploy() as deployment:
        source = await upload(deployment, NOISE)
        events = await make(deployment, task={"cover": {"strength": 0.5}}, source=source)
        vae, dit = deployment.stages["vae"], deployment.stages["dit"]
        assert deployment.stages["lm"].requests == []
    assert np.array_equal(np.rint(vae.audio[0] * 32_767), WORDS)
    encode = vae.requests[0]
    assert (encode.frame_count, encode.model_fingerprint, encode.HasField("seed")) == (240_000, "vae-print", False)
    setup = dit.requests[0]
    assert (setup.task.cover.strength, setup.latent_frames, setup.source_frames) == (0.5, 125, 125)
    assert (setup.metadata.duration_s, setup.reference_count, list(setup.codes)) == (5, 0, [])
    assert dit.sources[0] is not None
    assert np.array_equal(dit.sources[0][:, 0], np.arange(125))
    assert events[-1].completed.frame_count == 240_000
    assert [timing.stage for timing in events[-1].completed.timings] == [STAGE_VAE, STAGE_DIT, STAGE_VAE]


async def test_variants_share_one_hearing_of_the_source(deploy: Deploy) -> None:
    async with deploy(Steady("dit", variant="base")) as deployment:
        source = await upload(deployment, NOISE)
        await make(deployment, task={"extract": {}}, source=source, variants=3)
        assert len(deployment.stages["vae"].audio) == 1
        assert len(deployment.stages["dit"].sources) == 3


async def test_a_silent_source_is_not_sent(deploy: Deploy) -> None:
    async with deploy() as deployment:
        await make(deployment, task={"cover": {}}, source=await upload(deployment, SILENCE))
        assert deployment.stages["vae"].audio == []
        setup = deployment.stages["dit"].requests[0]
    assert (setup.source_frames, setup.latent_frames, setup.task.HasField("cover")) == (0, 25, True)


async def test_a_sources_last_part_of_a_latent_is_left_out(deploy: Deploy) -> None:
    async with deploy(Steady("dit", variant="base")) as deployment:
        source = await upload(deployment, sound_file(words(48_000 + 1919), 48_000, "FLAC"))
        events = await make(deployment, task={"complete": {}}, source=source)
        assert deployment.stages["dit"].requests[0].source_frames == 25
    assert events[-1].completed.frame_count == 48_000


async def test_references_are_heard_in_windows_that_the_seed_draws(deploy: Deploy) -> None:
    async with deploy() as deployment:
        references = [await upload(deployment, ODD), await upload(deployment, sound_file(words(9600), 48_000, "WAV"))]
        for seed in (7, 7, 8):
            await make(deployment, references=references, seeds=[seed], metadata={"duration_s": 1})
        vae, dit = deployment.stages["vae"], deployment.stages["dit"]
    assert dit.requests[0].reference_count == 2
    assert dit.references[0] is not None
    assert np.array_equal(dit.references[0][:, 0], np.tile(np.arange(750), 2))
    first, second, again, _, other, _ = vae.audio
    assert len(first) == len(second) == REFERENCE_FRAMES
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


async def windows_of(num_frames: int, seed: int) -> list[NDArray[np.float32]]:
    """The windows of a reference whose samples are their own places."""
    samples = np.repeat(np.arange(num_frames, dtype=np.float32)[:, None], 2, axis=1)
    sound = OpenSound.of(Recording(samples=samples, is_silent=False, sample_rate_hz=48_000, channels=2))
    return [window async for window in reference_windows(sound, seed=seed)]


@settings(max_examples=15)
@given(length=st.integers(1, 100_000), seed=st.integers(0, 2**40))
async def test_windows_of_a_short_reference_go_round_it(length: int, seed: int) -> None:
    windows = await windows_of(length, seed)
    assert [window.shape for window in windows] == [(480_000, 2)] * 3
    for window in windows:
        assert np.array_equal(window[:, 0], (window[0, 0] + np.arange(480_000)) % length)


@pytest.mark.parametrize("seed", range(20))
async def test_windows_of_a_long_reference_stay_in_their_third(seed: int) -> None:
    starts = [int(window[0, 0]) // 48_000 for window in await windows_of(60 * 48_000, seed)]
    assert [start // 20 for start in starts] == [0, 1, 2]
    assert all(start % 20 <= 10 for start in starts)


@pytest.mark.parametrize(
    ("mode", "fade"),
    [({"mode": "REPAINT_MODE_CONSERVATIVE"}, 2400), ({"strength": 0.5}, 1200), ({"strength": 0.25}, 1800)],
    ids=["conservative", "balanced", "mild"],
)
async def test_outside_of_the_window_a_repaint_is_the_source_to_the_bit(
    deploy: Deploy, mode: dict[str, Any], fade: int
) -> None:
    async with deploy() as deployment:
        source = await upload(deployment, NOISE)
        window = {"start_s": 1.01, "end_s": 3.03}
        events = await make(deployment, task={"repaint": window | mode}, source=source)
        decode = deployment.stages["vae"].requests[1]
    song = np.frombuffer(pcm_of(events), "<i2").reshape(-1, 2)
    start, end = round(1.01 * 48_000), round(3.03 * 48_000)
    assert decode.sample_format == SAMPLE_FORMAT_F32
    assert np.array_equal(song[: start - fade], WORDS[: start - fade])
    assert np.array_equal(song[end + fade :], WORDS[end + fade :])
    # The fake stages make latent frame n into words of n + seed.
    assert np.array_equal(song[start:end, 0], np.arange(start, end) // 1920 + 7)
    assert not np.array_equal(song[start - fade : start], WORDS[start - fade : start])
    assert events[-1].completed.peak == pytest.approx(np.abs(song.astype(int)).max() / 32_767, abs=1 / 32_767)
    header = next(event.audio_header for event in events if event.HasField("audio_header"))
    assert (header.format.sample_format, header.frame_count) == (SAMPLE_FORMAT_S16, 240_000)


async def test_an_aggressive_repaint_keeps_nothing(deploy: Deploy) -> None:
    async with deploy() as deployment:
        source = await upload(deployment, NOISE)
        task = {"repaint": {"start_s": 1, "end_s": 3, "mode": "REPAINT_MODE_AGGRESSIVE"}}
        events = await make(deployment, task=task, source=source)
    # The fake stages make latent frame n into words of n + seed.
    assert np.array_equal(np.frombuffer(pcm_of(events), "<i2")[:: 2 * 1920], np.arange(125) + 7)


async def test_beyond_the_ends_there_is_silence_to_paint_on(deploy: Deploy) -> None:
    async with deploy() as deployment:
        source = await upload(deployment, NOISE)
        task = {"repaint": {"start_s": -1, "end_s": 0.5, "mode": "REPAINT_MODE_CONSERVATIVE"}}
        events = await make(deployment, task=task, source=source)
        heard, setup = deployment.stages["vae"].audio[0], deployment.stages["dit"].requests[0]
    assert not heard[:48_000].any()
    assert np.array_equal(np.rint(heard[48_000:] * 32_767), WORDS)
    assert (setup.task.repaint.start_s, setup.task.repaint.end_s, setup.latent_frames) == (0, 1.5, 150)
    song = np.frombuffer(pcm_of(events), "<i2").reshape(-1, 2)
    assert np.array_equal(song[72_000 + 2400 :], WORDS[24_000 + 2400 :])


async def test_a_place_in_the_queue_is_passed_on(deploy: Deploy) -> None:
    async with deploy() as deployment:
        events = await make(deployment, metadata={"duration_s": 1})
    [queued] = [event.queued for event in events if event.HasField("queued")]
    assert (queued.stage, queued.position, queued.wait_s) == (STAGE_DIT, 2, 1.5)


async def test_adapters_reach_the_diffusion(deploy: Deploy) -> None:
    async with deploy(Steady("dit", adapters={"warm"})) as deployment:
        await make(deployment, adapters=[{"name": "warm", "scale": -0.5}], metadata={"duration_s": 1})
        [use] = deployment.stages["dit"].requests[0].adapters
    assert (use.name, use.scale) == ("warm", -0.5)


async def test_an_adapter_that_is_not_loaded_is_refused_before_anything_is_made(deploy: Deploy) -> None:
    async with deploy(Steady("dit", adapters={"warm"})) as deployment:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await make(deployment, adapters=[{"name": "warm"}, {"name": "cold"}])
        assert not deployment.stages["lm"].requests
    [violation] = read_details(caught.value).violations
    assert (violation.field, violation.description) == (
        "adapters[1].name",
        "is 'cold'; must be an adapter that is loaded for the model: warm",
    )


async def test_a_source_longer_than_the_stages_make_is_refused_with_the_limit(deploy: Deploy) -> None:
    async with deploy(max_duration_s=4) as deployment:
        source = await upload(deployment, NOISE)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await make(deployment, task={"cover": {}}, source=source)
    [violation] = read_details(caught.value).violations
    assert (violation.field, violation.description) == ("source", "makes a song of 5 s; at most 4 s are made")


async def test_an_accepted_song_needs_no_asset_any_more_though_its_gateway_is_another(deploy: Deploy) -> None:
    fields: dict[str, Any] = {"task": {"repaint": {"start_s": 1, "end_s": 2}}, "seeds": [7, 8], "variants": 2}
    async with deploy() as deployment:
        names = [await upload(deployment, data) for data in (NOISE, ODD)]
        whole = await make(deployment, **fields, source=names[0], references=names)
        heard = deployment.stages["vae"].audio
    async with deploy(Stuck("dit")) as deployment:
        names = [await upload(deployment, data) for data in (NOISE, ODD)]
        request = GenerateSongRequest(caption="x", detach=True, **fields, source=names[0], references=names)
        accepted = await anext(aiter(SongServiceStub(deployment.channel).GenerateSong(request)))
        song = accepted.accepted.song  # pyright: ignore[reportAttributeAccessIssue]
        await asyncio.wait_for(deployment.stages["dit"].begun.wait(), 5)
    async with deploy() as deployment:
        assert deployment.assets.size_bytes == 0
        async for _ in SongServiceStub(deployment.channel).WatchSong(WatchSongRequest(song=song)):
            pass
        again = deployment.stages["vae"].audio
        for variant in range(2):
            call = SongServiceStub(deployment.channel).StreamAudio(StreamAudioRequest(song=song, variant=variant))
            data = b"".join([event.audio_chunk.data async for event in call])
            assert data == pcm_of([event for event in whole if event.variant == variant])
    # First the source is heard, then each variant's windows of each reference, variants beside each other.
    assert np.array_equal(heard[0], again[0])
    assert sorted(audio.tobytes() for audio in heard) == sorted(audio.tobytes() for audio in again)


async def test_cancel_reaches_the_codec_while_it_hears_the_source(deploy: Deploy) -> None:
    stuck = Stuck("vae")
    async with deploy(stuck) as deployment:
        source = await upload(deployment, sound_file(tone(1, 48_000), 48_000, "WAV"))
        call = SongServiceStub(deployment.channel).GenerateSong(
            GenerateSongRequest(task={"cover": {}}, source=source)  # pyright: ignore[reportArgumentType]
        )
        await anext(aiter(call))
        await asyncio.wait_for(stuck.begun.wait(), 5)
        call.cancel()
        await asyncio.wait_for(stuck.cancelled.wait(), 5)
