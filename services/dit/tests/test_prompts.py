"""The prompts, to the byte."""

from dataclasses import replace

import pytest
from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from hypothesis import given
from hypothesis import strategies as st

from soundstage_dit.prompts import instruction, lyric_prompt, text_prompt
from soundstage_dit.song import Complete, Cover, Diffusion, Edit, Extract, Lego, Repaint, Song, Task, TextToMusic
from soundstage_runtime.score import KEY_SCALES, TIME_SIGNATURES

SONG = Song(
    caption="A calm piano",
    lyrics="[verse]\nhello",
    num_frames=768,
    seed=0,
    bpm=120,
    key_scale="C major",
    time_signature="4",
    language="en",
    duration_s=30.7,
)


def test_a_song_with_all_metadata() -> None:
    assert text_prompt(SONG) == (
        "# Instruction\nFill the audio semantic mask based on the given conditions:\n\n# Caption\nA calm piano\n\n"
        "# Metas\n- bpm: 120\n- timesignature: 4\n- keyscale: C major\n- duration: 30 seconds\n<|endoftext|>\n"
    )
    assert lyric_prompt(SONG) == "# Languages\nen\n\n# Lyric\n[verse]\nhello<|endoftext|>"


def test_a_song_without_metadata() -> None:
    song = Song(caption="A calm piano", lyrics="[Instrumental]", num_frames=750, seed=0)
    assert text_prompt(song).endswith(
        "# Metas\n- bpm: N/A\n- timesignature: N/A\n- keyscale: N/A\n- duration: 30 seconds\n<|endoftext|>\n"
    )
    assert lyric_prompt(song) == "# Languages\nunknown\n\n# Lyric\n[Instrumental]<|endoftext|>"


def test_a_song_with_codes_is_asked_for_in_other_words() -> None:
    song = Song(caption="A calm piano", lyrics="", num_frames=5, seed=0, codes=(1,))
    assert text_prompt(song).startswith(
        "# Instruction\nGenerate audio semantic tokens based on the given conditions:\n\n# Caption\nA calm piano\n\n"
    )


FOLLOW = "Generate audio semantic tokens based on the given conditions:"
FILL = "Fill the audio semantic mask based on the given conditions:"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (TextToMusic(), FILL),
        (Cover(), FOLLOW),
        (Cover(from_latents=True), FOLLOW),
        (
            Repaint(start=0, end=1, injection=0, blend_frames=0),
            "Repaint the mask area based on the given conditions:",
        ),
        (Extract(track="backing_vocals"), "Extract the BACKING_VOCALS track from the audio:"),
        (Extract(), "Extract the track from the audio:"),
        (Lego(track="backing_vocals"), "Generate the BACKING_VOCALS track based on the audio context:"),
        (Lego(), "Generate the track based on the audio context:"),
        (Complete(tracks=("drums", "bass")), "Complete the input track with DRUMS | BASS:"),
        (Complete(tracks=("drums",)), "Complete the input track with DRUMS:"),
        (Complete(), "Complete the input track:"),
        (Edit(source_caption="", source_lyrics=""), FILL),
        (Edit(source_caption="", source_lyrics="", context="codes"), FOLLOW),
        (Edit(source_caption="", source_lyrics="", context="latents"), FOLLOW),
    ],
)
def test_every_task_is_asked_for_in_its_own_words(task: Task, expected: str) -> None:
    song = replace(SONG, task=task)
    assert instruction(song) == expected
    assert text_prompt(song).startswith(
        f"# Instruction\n{expected}\n\n# Caption\nA calm piano\n\n# Metas\n- bpm: 120\n"
    )


@pytest.mark.parametrize(("is_explicit", "controls"), [(True, "true"), (False, "false")])
def test_a_model_for_stems_reads_of_the_mix_and_of_the_mask(is_explicit: bool, controls: str) -> None:
    lego = Lego(track="drums", mix="A rock song")
    song = replace(SONG, task=lego, diffusion=Diffusion(is_mask_explicit=is_explicit))
    assert text_prompt(song, for_stems=True).startswith(
        "# Instruction\nGenerate the DRUMS track based on the audio context:\n\n"
        f"# Caption\nGlobal: A rock song\nLocal: A calm piano\nMask Control: {controls}\n\n# Metas\n"
    )
    assert "# Caption\nA calm piano\n\n" in text_prompt(song)
    assert text_prompt(SONG, for_stems=True) == text_prompt(SONG)


tracks = st.sampled_from(("woodwinds", "backing_vocals", "fx"))


@given(
    st.builds(Extract, track=st.none() | tracks)
    | st.builds(Lego, track=st.none() | tracks)
    | st.builds(Complete, tracks=st.lists(tracks, unique=True).map(tuple))
)
def test_instructions_equal_those_of_diffusers(task: Extract | Lego | Complete) -> None:
    theirs = AceStepPipeline._get_task_instruction(  # pyright: ignore[reportPrivateUsage]
        task_type=type(task).__name__.lower(),
        track_name=None if isinstance(task, Complete) else task.track,
        complete_track_classes=list(task.tracks) if isinstance(task, Complete) else None,
    )
    assert instruction(replace(SONG, task=task)) == theirs


@given(
    caption=st.text(),
    bpm=st.none() | st.integers(30, 300),
    key_scale=st.none() | st.sampled_from(KEY_SCALES),
    time_signature=st.none() | st.sampled_from(TIME_SIGNATURES),
    duration_s=st.floats(1, 600),
)
def test_prompts_equal_those_of_diffusers(
    caption: str, bpm: int | None, key_scale: str | None, time_signature: str | None, duration_s: float
) -> None:
    song = Song(
        caption=caption,
        lyrics=caption,
        num_frames=1,
        seed=0,
        bpm=bpm,
        key_scale=key_scale,
        time_signature=time_signature,
        language="yue",
        duration_s=duration_s,
    )
    # The method reads nothing of the pipeline but its own helpers, so one without networks will do.
    theirs = AceStepPipeline._format_prompt(  # pyright: ignore[reportPrivateUsage]
        AceStepPipeline.__new__(AceStepPipeline),
        prompt=caption,
        lyrics=caption,
        vocal_language="yue",
        audio_duration=duration_s,
        bpm=bpm,
        keyscale=key_scale,
        timesignature=time_signature,
    )
    assert (text_prompt(song), lyric_prompt(song)) == theirs
