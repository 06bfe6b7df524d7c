"""An order: what a request asks for, checked whole and with every default filled in."""

from collections.abc import Callable
from dataclasses import dataclass

from soundstage.music.v1.song_service_pb2 import GenerateSongRequest
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32, SAMPLE_FORMAT_S16, SampleFormat
from soundstage.type.v1.options_pb2 import DiffusionOptions, SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_runtime.score import INSTRUMENTAL
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks

MAX_VARIANTS = 8
SAMPLE_FORMATS = (SAMPLE_FORMAT_S16, SAMPLE_FORMAT_F32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A valid request. `seeds` has one entry for every variant."""

    caption: str
    lyrics: str
    metadata: SongMetadata
    is_planned: bool
    sampling: SamplingOptions
    diffusion: DiffusionOptions
    sample_format: SampleFormat.ValueType
    seeds: tuple[int, ...]


def read_order(
    request: GenerateSongRequest, *, draw_seed: Callable[[], int], max_variants: int = MAX_VARIANTS
) -> Order:
    """Check every field and fill in what is left open; raises InvalidRequestError naming all that are bad."""
    checks = Checks()
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    if not request.caption.strip() and not request.lyrics.strip():
        checks.refuse("caption", "is empty, and so is lyrics; say in one of them what to make")
    if request.instrumental and request.lyrics.strip():
        checks.refuse("lyrics", "must be empty when instrumental is true")
    checks.metadata(request.metadata)
    checks.sampling(request.planner.sampling, field="planner.sampling")
    checks.diffusion(request.diffusion, field="diffusion")
    is_planned = request.planner.enabled if request.planner.HasField("enabled") else True
    if not is_planned and not request.metadata.HasField("duration_s"):
        checks.refuse("metadata.duration_s", "is not set; it is needed when planner.enabled is false")
    sample_format = request.output.sample_format or SAMPLE_FORMAT_S16
    if sample_format not in SAMPLE_FORMATS:
        names = ", ".join(SampleFormat.Name(value) for value in SAMPLE_FORMATS)
        checks.refuse("output.sample_format", f"is {sample_format}; must be one of {names}")
    variants = request.variants if request.HasField("variants") else 1
    checks.number("variants", variants, 1, max_variants)
    if len(request.seeds) > variants:
        checks.refuse("seeds", f"has {len(request.seeds)} entries for {variants} variants; at most one for each")
    checks.finish()
    return Order(
        caption=request.caption,
        lyrics=INSTRUMENTAL if request.instrumental else request.lyrics,
        metadata=request.metadata,
        is_planned=is_planned,
        sampling=request.planner.sampling,
        diffusion=request.diffusion,
        sample_format=sample_format,
        seeds=tuple(request.seeds) + tuple(draw_seed() for _ in range(variants - len(request.seeds))),
    )
