"""The prompts the models were trained on, to the byte."""

from typing import Final

from soundstage_dit.song import Complete, Cover, Edit, Extract, Lego, Repaint, Song

FILL: Final = "Fill the audio semantic mask based on the given conditions:"
FOLLOW_CODES: Final = "Generate audio semantic tokens based on the given conditions:"
REPAINT: Final = "Repaint the mask area based on the given conditions:"
END_OF_TEXT: Final = "<|endoftext|>"
_UNKNOWN: Final = "N/A"
_UNKNOWN_DURATION_S: Final = 30


def instruction(song: Song) -> str:
    """Say what is asked for; a song that has codes, or follows a source, is asked for in other words."""
    match song.task:
        case Repaint():
            return REPAINT
        case Extract(track=track):
            return f"Extract the {_named(track)}track from the audio:"
        case Lego(track=track):
            return f"Generate the {_named(track)}track based on the audio context:"
        case Complete(tracks=tracks):
            with_tracks = f" with {' | '.join(tracks).upper()}" if tracks else ""
            return f"Complete the input track{with_tracks}:"
        case Cover() | Edit(context="codes" | "latents"):
            return FOLLOW_CODES
        case _:
            return FOLLOW_CODES if song.codes else FILL


def _named(track: str | None) -> str:
    return f"{track.upper()} " if track else ""


def text_prompt(song: Song, *, for_stems: bool = False) -> str:
    """Write the prompt that the text encoder reads; a model for stems reads of a lego's mix too."""
    duration_s = _UNKNOWN_DURATION_S if song.duration_s is None else int(song.duration_s)
    return (
        f"# Instruction\n{instruction(song)}\n\n"
        f"# Caption\n{_stems_caption(song) if for_stems else song.caption}\n\n"
        f"# Metas\n"
        f"- bpm: {song.bpm or _UNKNOWN}\n"
        f"- timesignature: {song.time_signature or _UNKNOWN}\n"
        f"- keyscale: {song.key_scale or _UNKNOWN}\n"
        f"- duration: {duration_s} seconds\n"
        f"{END_OF_TEXT}\n"
    )


def _stems_caption(song: Song) -> str:
    if not isinstance(song.task, Lego):
        return song.caption
    controls = "true" if song.diffusion.is_mask_explicit else "false"
    return f"Global: {song.task.mix}\nLocal: {song.caption}\nMask Control: {controls}"


def lyric_prompt(song: Song) -> str:
    """Write the prompt whose tokens the lyric encoder reads."""
    return f"{lyric_head(song)}{song.lyrics}{END_OF_TEXT}"


def lyric_head(song: Song) -> str:
    """Write what stands before the lyrics in their prompt."""
    return f"# Languages\n{song.language}\n\n# Lyric\n"
