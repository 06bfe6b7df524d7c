"""Requests, read and checked."""

import math

import pytest

from soundstage.stage.v1.dit_service_pb2 import DenoiseSetup
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_dit.request import read_song
from soundstage_dit.sampler import schedule
from soundstage_dit.song import Diffusion, Song
from soundstage_runtime.errors import InvalidRequestError


def test_absent_fields_take_their_defaults() -> None:
    song = read_song(DenoiseSetup(caption="a", lyrics="b", latent_frames=10, seed=3), variant="turbo")
    assert song == Song(caption="a", lyrics="b", num_frames=10, seed=3)
    assert (song.diffusion.times, song.language) == (tuple(schedule(8, 3.0)), "unknown")


def test_given_fields_are_read() -> None:
    metadata = SongMetadata(bpm=30, key_scale="F♯ minor", time_signature="6", vocal_language="yue", duration_s=600)
    request = DenoiseSetup(
        caption="a",
        lyrics="",
        latent_frames=15_000,
        seed=2**32 - 1,
        codes=[0, 63_999],
        metadata=metadata,
        options=DiffusionOptions(steps=20, shift=5),
    )
    assert read_song(request, variant="turbo") == Song(
        caption="a",
        lyrics="",
        num_frames=15_000,
        seed=2**32 - 1,
        codes=(0, 63_999),
        bpm=30,
        key_scale="F♯ minor",
        time_signature="6",
        language="yue",
        duration_s=600,
        diffusion=Diffusion(times=tuple(schedule(20, 5))),
    )


def test_codes_beyond_the_song_are_cut() -> None:
    assert read_song(DenoiseSetup(latent_frames=11, codes=range(9)), variant="turbo").codes == (0, 1, 2)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (DenoiseSetup(latent_frames=1, caption="a <|im_end|> b"), "caption"),
        (DenoiseSetup(latent_frames=1, lyrics="<think>"), "lyrics"),
        (DenoiseSetup(latent_frames=0), "latent_frames"),
        (DenoiseSetup(latent_frames=15_001), "latent_frames"),
        (DenoiseSetup(latent_frames=5, codes=[1, 64_000, 70_000]), "codes[1]"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(bpm=29)), "metadata.bpm"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(bpm=0)), "metadata.bpm"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(duration_s=0.5)), "metadata.duration_s"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(duration_s=math.nan)), "metadata.duration_s"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(duration_s=math.inf)), "metadata.duration_s"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(key_scale="H major")), "metadata.key_scale"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(key_scale="")), "metadata.key_scale"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(time_signature="5")), "metadata.time_signature"),
        (DenoiseSetup(latent_frames=1, metadata=SongMetadata(vocal_language="xx")), "metadata.vocal_language"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(steps=0)), "options.steps"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(steps=21)), "options.steps"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(shift=0.9)), "options.shift"),
        (DenoiseSetup(latent_frames=1, options=DiffusionOptions(shift=math.nan)), "options.shift"),
    ],
)
def test_a_bad_field_is_named(request_: DenoiseSetup, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_song(request_, variant="turbo")
    assert [violation.field for violation in caught.value.violations] == [field]
