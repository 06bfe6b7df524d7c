"""The prompts, to the byte."""

from diffusers.pipelines.ace_step.pipeline_ace_step import AceStepPipeline
from hypothesis import given
from hypothesis import strategies as st

from soundstage_dit.prompts import lyric_prompt, text_prompt
from soundstage_dit.song import Song
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
