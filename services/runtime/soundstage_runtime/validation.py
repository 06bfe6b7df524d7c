"""Checks of request fields that more than one process makes. All violations of a request are gathered, then raised."""

import math
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from google.protobuf.message import Message

from soundstage.type.v1.options_pb2 import (
    AdapterUse,
    DiffusionOptions,
    Guidance,
    GuidanceMethod,
    MaskMode,
    Sampler,
    SamplingOptions,
    WaveletMode,
)
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage.type.v1.task_pb2 import TRACK_UNSPECIFIED, Edit, EditContext, Lego, Repaint, RepaintMode, Task, Track
from soundstage_runtime.errors import InvalidRequestError, Violation
from soundstage_runtime.score import BPM_RANGE, DURATION_RANGE_S, LANGUAGES, NUM_CODES, TIME_SIGNATURES
from soundstage_runtime.spelling import spell_key_scale, spell_language, spell_time_signature
from soundstage_runtime.text import control_tokens

MAX_CAPTION_CHARS = 2048
MAX_LYRICS_CHARS = 8192
MAX_STEPS: Final = 200
MAX_ADAPTERS: Final = 16
MAX_ADAPTER_SCALE: Final = 2
MAX_PAD_S: Final = 300  # that a repaint may reach beyond its source


class Enumeration(Protocol):
    """An enum of the contract; its first value names none of the others."""

    def keys(self) -> Sequence[str]:
        """Return the names."""
        ...

    def values(self) -> Sequence[int]:
        """Return the numbers."""
        ...


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

    def diffusion(self, diffusion: DiffusionOptions, *, field: str, max_steps: int = MAX_STEPS) -> None:
        """Check the fields of diffusion options that are set."""
        if diffusion.HasField("steps"):
            self.number(f"{field}.steps", diffusion.steps, 1, max_steps)
        self._optional(diffusion, field, "shift", 1, 5)
        self._timesteps(f"{field}.timesteps", diffusion.timesteps, max_steps)
        self._known(f"{field}.sampler", diffusion.sampler, Sampler)
        self._guidance(f"{field}.guidance", diffusion.guidance)
        self._optional(diffusion, field, "velocity_norm_threshold", 0, 10)
        self._optional(diffusion, field, "velocity_ema_factor", 0, 1)
        if diffusion.velocity_ema_factor == 1:
            self.refuse(f"{field}.velocity_ema_factor", "is 1; must be below 1")
        self._known(f"{field}.wavelet_correction.mode", diffusion.wavelet_correction.mode, WaveletMode)
        self._optional(diffusion.wavelet_correction, f"{field}.wavelet_correction", "scale", 0, 1)
        self._optional(diffusion.wavelet_correction, f"{field}.wavelet_correction", "high_scale", 0, 1)
        self._optional(diffusion, field, "latent_shift", -10, 10)
        self._optional(diffusion, field, "latent_rescale", 0.1, 10)
        self._known(f"{field}.mask_mode", diffusion.mask_mode, MaskMode)
        self._optional(diffusion.retake, f"{field}.retake", "variance", 0, 1)

    def _guidance(self, field: str, guidance: Guidance) -> None:
        self._optional(guidance, field, "scale", 1, 15)
        self._known(f"{field}.method", guidance.method, GuidanceMethod)
        self._optional(guidance, field, "interval_start", 0, 1)
        self._optional(guidance, field, "interval_end", 0, 1)
        end = guidance.interval_end if guidance.HasField("interval_end") else 1
        if 0 <= end < guidance.interval_start <= 1:
            self.refuse(
                f"{field}.interval_end", f"is {end:g}; must be at least interval_start, {guidance.interval_start:g}"
            )

    def _timesteps(self, field: str, times: Sequence[float], max_steps: int) -> None:
        """Keep times falling, from at most 1 to above 0; a 0 at the end is no step."""
        above = times[:-1] if times and times[-1] == 0 else times
        if times and not 1 <= len(above) <= max_steps:
            self.refuse(field, f"has {len(above)} times above 0; must be 1 to {max_steps}")
        for index, (time, before) in enumerate(zip(above, (math.inf, *above), strict=False)):
            if not (0 < time <= 1 and time < before):
                self.refuse(f"{field}[{index}]", f"is {time:g}; times must fall, from at most 1 to above 0")
                return

    def adapters(self, adapters: Sequence[AdapterUse], *, field: str) -> None:
        """Keep adapters few and named, each once, and their scales in range."""
        if self._too_many(field, adapters, MAX_ADAPTERS):
            return
        names = [use.name for use in adapters]
        for index, name in enumerate(names):
            if not name:
                self.refuse(f"{field}[{index}].name", "is empty; ListAdapters has the names")
            elif name in names[:index]:
                self.refuse(f"{field}[{index}].name", f"is {name[:64]!r} once more; name each once")
            self._optional(adapters[index], f"{field}[{index}]", "scale", -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)

    def task(self, task: Task, *, field: str) -> None:
        """Check the fields of a task that are set."""
        kind = task.WhichOneof("kind")
        field = f"{field}.{kind}"
        match kind:
            case "cover":
                self._optional(task.cover, field, "strength", 0, 1)
                self._optional(task.cover, field, "noise_strength", 0, 1)
            case "repaint":
                self.number(f"{field}.start_s", task.repaint.start_s, -MAX_PAD_S, DURATION_RANGE_S[1])
                self._window_end(task.repaint, field)
                self._known(f"{field}.mode", task.repaint.mode, RepaintMode)
                self._optional(task.repaint, field, "strength", 0, 1)
            case "extract":
                self._known(f"{field}.track", task.extract.track, Track)
            case "lego":
                self._known(f"{field}.track", task.lego.track, Track)
                self.text(f"{field}.global_caption", task.lego.global_caption, max_chars=MAX_CAPTION_CHARS)
                self._optional(task.lego, field, "start_s", 0, DURATION_RANGE_S[1])
                self._window_end(task.lego, field)
            case "complete":
                self._tracks(f"{field}.tracks", task.complete.tracks)
            case "edit":
                self._edit(field, task.edit)
            case None:
                pass

    def _window_end(self, window: Repaint | Lego, field: str) -> None:
        if not window.HasField("end_s"):
            return
        before = len(self._violations)
        self.number(f"{field}.end_s", window.end_s, -MAX_PAD_S, DURATION_RANGE_S[1] + MAX_PAD_S)
        if len(self._violations) == before and not window.end_s > window.start_s:
            self.refuse(f"{field}.end_s", f"is {window.end_s:g}; must be above start_s, {window.start_s:g}")

    def _tracks(self, field: str, tracks: Sequence[Track.ValueType]) -> None:
        if self._too_many(field, tracks, len(Track.keys()) - 1):
            return
        for index, track in enumerate(tracks):
            if track == TRACK_UNSPECIFIED:
                self.refuse(f"{field}[{index}]", f"names none; must be one of {_names(Track)}")
            elif track in tracks[:index]:
                self.refuse(f"{field}[{index}]", f"is {Track.Name(track)} once more; name each once")
            else:
                self._known(f"{field}[{index}]", track, Track)

    def _edit(self, field: str, edit: Edit) -> None:
        self.text(f"{field}.source_caption", edit.source_caption, max_chars=MAX_CAPTION_CHARS)
        self.text(f"{field}.source_lyrics", edit.source_lyrics, max_chars=MAX_LYRICS_CHARS)
        self._optional(edit, field, "start", 0, 1)
        self._optional(edit, field, "end", 0, 1)
        end = edit.end if edit.HasField("end") else 1
        if 0 <= end < edit.start <= 1:
            self.refuse(f"{field}.end", f"is {end:g}; must be at least start, {edit.start:g}")
        self._optional(edit, field, "averages", 1, 8)
        self._known(f"{field}.context", edit.context, EditContext)

    def _too_many(self, field: str, entries: Sequence[object], max_entries: int) -> bool:
        """Tell whether there are more than may be, which is then the one thing refused: a look at each takes long."""
        if len(entries) > max_entries:
            self.refuse(field, f"has {len(entries)} entries; at most {max_entries}")
        return len(entries) > max_entries

    def _optional(self, message: Message, field: str, name: str, low: float, high: float) -> None:
        """Keep a number in [low, high] if it is set."""
        if message.HasField(name):
            self.number(f"{field}.{name}", getattr(message, name), low, high)

    def _known(self, field: str, value: int, names: Enumeration) -> None:
        """Refuse a value of an enum that a newer contract may have."""
        if value not in names.values():
            self.refuse(field, f"is {value}; must be one of {_names(names)}")


def _names(names: Enumeration) -> str:
    return ", ".join(names.keys()[1:])


def _plain(value: float) -> str:
    """Write a number as people do: whole ones in full, others short."""
    return str(value) if isinstance(value, int) else f"{value:g}"
