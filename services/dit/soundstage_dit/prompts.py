"""The prompts the models were trained on, to the byte."""

from typing import Final

from soundstage_dit.song import Song

FILL: Final = "Fill the audio semantic mask based on the given conditions:"
FOLLOW_CODES: Final = "Generate audio semantic tokens based on the given conditions:"
_UNKNOWN: Final = "N/A"
_UNKNOWN_DURATION_S: Final = 30


def text_prompt(song: Song) -> str:
    """Write the prompt that the text encoder reads; a song that has codes is asked for in other words."""
    duration_s = _UNKNOWN_DURATION_S if song.duration_s is None else int(song.duration_s)
    return (
        f"# Instruction\n{FOLLOW_CODES if song.codes else FILL}\n\n"
        f"# Caption\n{song.caption}\n\n"
        f"# Metas\n"
        f"- bpm: {song.bpm or _UNKNOWN}\n"
        f"- timesignature: {song.time_signature or _UNKNOWN}\n"
        f"- keyscale: {song.key_scale or _UNKNOWN}\n"
        f"- duration: {duration_s} seconds\n"
        f"<|endoftext|>\n"
    )


def lyric_prompt(song: Song) -> str:
    """Write the prompt whose tokens the lyric encoder reads."""
    return f"# Languages\n{song.language}\n\n# Lyric\n{song.lyrics}<|endoftext|>"
