"""The planner's prompts, to the byte as it was trained on them.

A prompt is a sequence of parts. Only a Control becomes a control token; a plain string is always read as words,
whatever a user wrote into it.
"""

from enum import StrEnum
from typing import Final

from soundstage_lm import cot
from soundstage_lm.brief import Metadata

NO_INPUT: Final = "NO USER INPUT"
_INSTRUCTION: Final = "Generate audio semantic tokens based on the given conditions:"


class Control(StrEnum):
    """A control token that a prompt may hold."""

    START = "<|im_start|>"
    END = "<|im_end|>"
    THINK = cot.START
    END_THINK = cot.END


Prompt = tuple[Control | str, ...]


def metadata_prompt(caption: str, lyrics: str) -> Prompt:
    """Ask for the metadata; the model answers with its chain of thought."""
    return _turns(_words(caption, lyrics))


def codes_prompt(caption: str, lyrics: str, metadata: Metadata) -> Prompt:
    """Ask for the codes: the assistant's turn is open after its chain of thought."""
    return _turns(_words(caption, lyrics)) + _thought(metadata)


def unguided_prompt(negative_prompt: str) -> Prompt:
    """Ask for the codes of anything, or of what the guidance shall move away from."""
    is_blank = negative_prompt.strip() in ("", NO_INPUT)
    return _turns(NO_INPUT if is_blank else negative_prompt) + _thought(Metadata())


def render(prompt: Prompt) -> str:
    """Join a prompt's parts to the text they stand for."""
    return "".join(prompt)


def _words(caption: str, lyrics: str) -> str:
    return f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n"


def _turns(user: str) -> Prompt:
    return (
        *(Control.START, f"system\n# Instruction\n{_INSTRUCTION}\n\n", Control.END, "\n"),
        *(Control.START, f"user\n{user}", Control.END, "\n"),
        *(Control.START, "assistant\n"),
    )


def _thought(metadata: Metadata) -> Prompt:
    return (Control.THINK, cot.dump(metadata), Control.END_THINK, "\n\n")
