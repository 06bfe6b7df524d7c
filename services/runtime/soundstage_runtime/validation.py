"""Checks of request fields that more than one process makes. All violations of a request are gathered, then raised."""

import math
from collections.abc import Callable, Sequence

from soundstage.type.v1.options_pb2 import DiffusionOptions, SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import BPM_RANGE, DURATION_RANGE_S, LANGUAGES, NUM_CODES, TIME_SIGNATURES
from soundstage_runtime.spelling import spell_key_scale, spell_language, spell_time_signature
from soundstage_runtime.text import control_tokens

MAX_CAPTION_CHARS = 2048
MAX_LYRICS_CHARS = 8192


class Checks:
    """Gathers violations; a field is named by its path in the request."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def refuse(self, field: str, description: str) -> None:
        """Note that a field is bad."""
        self._violations.append(Violation(field=field, description=description))

    def finish(self) -> None:
        """Raise InvalidRequestError if anything was refused."""
        if self._violations:
            raise InvalidRequestError(self._violations)

    def text(self, field: str, value: str, *, max_chars: int) -> None:
        """Bound a text's length and keep control tokens out of it."""
        if len(value) > max_chars:
            self.refuse(field, f"has {len(value)} characters; at most {max_chars}")
        found = control_tokens(value)
        if found:
            self.refuse(field, f"holds the control token {found[0]}; take it out")

    def number(self, field: str, value: float, low: float, high: float) -> None:
        """Keep a number finite and in [low, high]."""
        if not (math.isfinite(value) and low <= value <= high):
            self.refuse(field, f"is {_plain(value)}; must be {_plain(low)} to {_plain(high)}")

    def codes(self, field: str, codes: Sequence[int]) -> None:
        """Keep audio codes inside the codebook; the first that is not is named by its place."""
        bad = next((index for index, code in enumerate(codes) if code >= NUM_CODES), None)
        if bad is not None:
            self.refuse(f"{field}[{bad}]", f"is {codes[bad]}; must be 0 to {NUM_CODES - 1}")

    def metadata(self, metadata: SongMetadata, *, max_duration_s: float = DURATION_RANGE_S[1]) -> SongMetadata:
        """Check the fields of `metadata` that are set; return them spelled as the models know them."""
        spelled = SongMetadata()
        spelled.CopyFrom(metadata)
        if metadata.HasField("bpm"):
            self.number("metadata.bpm", metadata.bpm, *BPM_RANGE)
        if metadata.HasField("key_scale"):
            wanted = "a note A to G, an optional #, b, ♯ or ♭, and major or minor"
            spelled.key_scale = self._spelled("metadata.key_scale", metadata.key_scale, spell_key_scale, wanted)
        if metadata.HasField("time_signature"):
            wanted = "one of " + ", ".join(TIME_SIGNATURES)
            found = self._spelled("metadata.time_signature", metadata.time_signature, spell_time_signature, wanted)
            spelled.time_signature = found
        if metadata.HasField("vocal_language"):
            spelled.vocal_language = self.language("metadata.vocal_language", metadata.vocal_language)
        if metadata.HasField("duration_s"):
            self.number("metadata.duration_s", metadata.duration_s, DURATION_RANGE_S[0], max_duration_s)
        return spelled

    def language(self, field: str, value: str) -> str:
        """Keep a language among those that can be sung; return it as the models spell it."""
        return self._spelled(field, value, spell_language, "one of " + " ".join(LANGUAGES))

    def _spelled(self, field: str, value: str, spell: Callable[[str], str | None], wanted: str) -> str:
        found = spell(value)
        if found is None:
            self.refuse(field, f"is {value[:40]!r}; must be {wanted}")
        return found or ""

    def sampling(self, sampling: SamplingOptions, *, field: str) -> None:
        """Check the fields of sampling options that are set."""
        if sampling.HasField("temperature"):
            self.number(f"{field}.temperature", sampling.temperature, 0, 2)
        if sampling.HasField("guidance_scale"):
            self.number(f"{field}.guidance_scale", sampling.guidance_scale, 1, 10)
        if sampling.HasField("top_p"):
            self.number(f"{field}.top_p", sampling.top_p, 0, 1)
            if sampling.top_p == 0:
                self.refuse(f"{field}.top_p", "is 0; must be above 0")
        if sampling.HasField("repetition_penalty"):
            self.number(f"{field}.repetition_penalty", sampling.repetition_penalty, 1, 2)
        if sampling.HasField("negative_prompt"):
            self.text(f"{field}.negative_prompt", sampling.negative_prompt, max_chars=MAX_CAPTION_CHARS)

    def diffusion(self, diffusion: DiffusionOptions, *, field: str) -> None:
        """Check the fields of diffusion options that are set."""
        if diffusion.HasField("steps"):
            self.number(f"{field}.steps", diffusion.steps, 1, 20)
        if diffusion.HasField("shift"):
            self.number(f"{field}.shift", diffusion.shift, 1, 5)


def _plain(value: float) -> str:
    """Write a number as people do: whole ones in full, others short."""
    return str(value) if isinstance(value, int) else f"{value:g}"
