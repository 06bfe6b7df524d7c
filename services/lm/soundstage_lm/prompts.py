"""The planner's prompts, to the byte as it was trained on them.

A prompt is a sequence of parts. Only a Control becomes a control token, and only Codes become audio codes; a plain
string is always read as words, whatever a user wrote into it.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Final

from soundstage_lm import cot
from soundstage_lm.brief import Metadata
from soundstage_runtime.score import INSTRUMENTAL

NO_INPUT: Final = "NO USER INPUT"
_PLAN: Final = "Generate audio semantic tokens based on the given conditions:"
_UNDERSTAND: Final = "Understand the given musical conditions and describe the audio semantics accordingly:"
_DRAFT: Final = "Expand the user's input into a more detailed and specific musical description:"
_POLISH: Final = "Format the user's input into a more detailed and specific musical description:"


class Control(StrEnum):
    """A control token that a prompt may hold."""

    START = "<|im_start|>"
    END = "<|im_end|>"
    THINK = cot.START
    END_THINK = cot.END


class Codes(tuple[int, ...]):
    """Audio codes that a prompt may hold."""

    __slots__ = ()

    def __str__(self) -> str:
        """Name their tokens."""
        return "".join(map(code_name, self))


Prompt = tuple[Control | Codes | str, ...]


def code_name(code: int) -> str:
    """Name an audio code's token."""
    return f"<|audio_code_{code}|>"


def metadata_prompt(caption: str, lyrics: str) -> Prompt:
    """Ask for the metadata; the model answers with its chain of thought."""
    return _turns(_PLAN, _words(caption, lyrics))


def codes_prompt(caption: str, lyrics: str, metadata: Metadata) -> Prompt:
    """Ask for the codes: the assistant's turn is open after its chain of thought."""
    return _turns(_PLAN, _words(caption, lyrics)) + _thought(metadata)


def unguided_prompt(negative_prompt: str) -> Prompt:
    """Ask for the codes of anything, or of what the guidance shall move away from."""
    is_blank = negative_prompt.strip() in ("", NO_INPUT)
    return _turns(_PLAN, NO_INPUT if is_blank else negative_prompt) + _thought(Metadata())


def understand_prompt(codes: Sequence[int]) -> Prompt:
    """Ask for the description of what the codes sound like."""
    return _turns(_UNDERSTAND, Codes(codes))


def unheard_prompt() -> Prompt:
    """Ask for the description of what is not heard."""
    return _turns(_UNDERSTAND, NO_INPUT)


def draft_prompt(query: str, *, is_instrumental: bool) -> Prompt:
    """Ask for a song's text of a few words."""
    is_told = "true" if is_instrumental else "false"
    return _turns(_DRAFT, f"{query if query.strip() else NO_INPUT}\n\ninstrumental: {is_told}")


def polish_prompt(caption: str, lyrics: str) -> Prompt:
    """Ask for a song's text, written better."""
    caption = caption if caption.strip() else NO_INPUT
    lyrics = lyrics if lyrics.strip() else INSTRUMENTAL
    return _turns(_POLISH, _words(caption, lyrics).removesuffix("\n"))


def render(prompt: Prompt) -> str:
    """Join a prompt's parts to the text they stand for."""
    return "".join(map(str, prompt))


def _words(caption: str, lyrics: str) -> str:
    return f"# Caption\n{caption}\n\n# Lyric\n{lyrics}\n"


def _turns(instruction: str, user: str | Codes) -> Prompt:
    asked = (f"user\n{user}",) if isinstance(user, str) else ("user\n", user)
    return (
        *(Control.START, f"system\n# Instruction\n{instruction}\n\n", Control.END, "\n"),
        *(Control.START, *asked, Control.END, "\n"),
        *(Control.START, "assistant\n"),
    )


def _thought(metadata: Metadata) -> Prompt:
    return (Control.THINK, cot.dump(metadata), Control.END_THINK, "\n\n")
