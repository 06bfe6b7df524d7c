"""What the planner is asked for, and what it answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is known about a song beside its lyrics; None is unknown."""

    bpm: int | None = None
    caption: str | None = None
    duration_s: float | None = None
    key_scale: str | None = None
    vocal_language: str | None = None
    time_signature: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the planner has nothing left to write before the codes."""
        return None not in (self.bpm, self.duration_s, self.key_scale, self.time_signature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the order in which the options act is in sampling.py."""

    temperature: float = 0.85
    guidance_scale: float = 2.0
    top_k: int = 0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    negative_prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brief:
    """A song to plan: the user's words, what the user fixed, and the seed of all draws."""

    caption: str
    lyrics: str
    metadata: Metadata
    seed: int
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settled metadata and the number of codes that follow."""

    metadata: Metadata
    code_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeRun:
    """Consecutive codes; `first_code` is the index in the song of the first."""

    first_code: int
    codes: list[int]
