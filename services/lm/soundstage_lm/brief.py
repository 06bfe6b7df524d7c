"""What the planner is asked for, and what it answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is known about a song beside its lyrics; None is unknown."""

    bpm: int | None = None
    caption: str | None = None
    duration_s: float | None = None
    genres: str | None = None
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
    """A song to plan: the user's words, what the user fixed, what shall be written, and the seed of all draws."""

    caption: str
    lyrics: str
    metadata: Metadata
    seed: int
    sampling: Sampling
    write_metadata: bool = True
    write_codes: bool = True
    rewrite_caption: bool = True
    detect_language: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A song's words asked for, whatever they are made from."""

    seed: int
    sampling: Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening(Request):
    """Audio codes to describe."""

    codes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Idea(Request):
    """A few words to make a song's text of."""

    query: str
    is_instrumental: bool
    vocal_language: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rough(Request):
    """A song's text to write better; what `metadata` fixes stays."""

    caption: str
    lyrics: str
    metadata: Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Words said of codes; empty ones say nothing. `spread` is the gain of a token that scores well, in nats."""

    codes: tuple[int, ...]
    caption: str
    lyrics: str
    metadata: Metadata
    spread: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """How well the parts of a claim fit, by name, and all of it; 0 to 1."""

    parts: dict[str, float]
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One settled field, named as in Metadata, as it stands in the chain of thought."""

    name: str
    value: str
    is_given: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The settled metadata, the planner's caption among them, and the number of codes that follow."""

    metadata: Metadata
    fields: tuple[Field, ...]
    code_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeRun:
    """Consecutive codes; `first_code` is the index in the song of the first."""

    first_code: int
    codes: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Song:
    """A song's text."""

    metadata: Metadata
    lyrics: str
