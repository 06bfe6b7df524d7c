"""A song to be made: what a DenoiseSetup asks for, with every default filled in."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from soundstage_dit.schedule import schedule

Latents = NDArray[np.float32]  # [frames, channels]


class Sampler(Enum):
    """How a step is taken."""

    EULER = "euler"
    HEUN = "heun"
    SDE = "sde"


class GuidanceMethod(Enum):
    """Which way guidance goes."""

    APG = "apg"
    CFG = "cfg"
    ADG = "adg"
    ADG_NORMED = "adg_normed"
    ADG_UNCLIPPED = "adg_unclipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Away from no words, at times in [start, end]; a scale of 1 does nothing."""

    scale: float
    method: GuidanceMethod = GuidanceMethod.APG
    start: float = 0.0
    end: float = 1.0


WaveletMode = Literal["double", "low", "high", "pixel"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wavelet:
    """The correction of bands after a step."""

    mode: WaveletMode = "double"
    scale: float = 0.05
    high_scale: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Retake:
    """A second noise, of which `variance` goes in."""

    seed: int
    variance: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Diffusion:
    """How latents are drawn. `times` fall from at most 1 and end in 0: one a step and the end."""

    times: tuple[float, ...] = tuple(schedule(8, 3.0))
    sampler: Sampler = Sampler.EULER
    guidance: Guidance = field(default_factory=lambda: Guidance(scale=1.0))
    velocity_norm_threshold: float = 0.0
    velocity_ema_factor: float = 0.0
    wavelet: Wavelet | None = None
    latent_shift: float = 0.0
    latent_rescale: float = 1.0
    is_mask_explicit: bool = True
    retake: Retake | None = None

    @property
    def steps(self) -> int:
        """How many steps there are."""
        return len(self.times) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToMusic:
    """Made from words, and from codes if there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """The source's melody, or that of the song's codes, anew. `strength` of the steps follow it."""

    strength: float = 1.0
    noise_strength: float = 0.0
    from_latents: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaint:
    """Frames [start, end) of the source anew.

    Its other frames are put back in `injection` of the steps, and blended over `blend_frames` at each end.
    """

    start: int
    end: int
    injection: float
    blend_frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extract:
    """A track out of the source."""

    track: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lego:
    """A track added to the source, in frames [start, end), None for all.

    Models for stems read the `mix` described beside the track.
    """

    track: str | None = None
    start: int | None = None
    end: int | None = None
    mix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """Tracks added around the source."""

    tracks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """The source moved from its own words to the song's, in steps [start * steps, end * steps)."""

    source_caption: str
    source_lyrics: str
    start: float = 0.0
    end: float = 1.0
    averages: int = 1
    context: Literal["silence", "codes", "latents"] = "silence"


Task = TextToMusic | Cover | Repaint | Extract | Lego | Complete | Edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Song:
    """What to make; None is unknown, `num_frames` counts latent frames, `codes` is empty or at most covers them.

    `model` is the fingerprint of the model that makes it; empty for the default one.

    `source` [num_frames, channels] is None where there is none or it is silent. References are [REFERENCE_LATENTS,
    channels] each.
    """

    caption: str
    lyrics: str
    num_frames: int
    seed: int
    diffusion: Diffusion = field(default_factory=Diffusion)
    bpm: int | None = None
    key_scale: str | None = None
    time_signature: str | None = None
    language: str = "unknown"
    duration_s: float | None = None
    codes: tuple[int, ...] = ()
    task: Task = TextToMusic()
    source: Latents | None = None
    references: tuple[Latents, ...] = ()
    adapters: tuple[tuple[str, float], ...] = ()
    model: str = ""
