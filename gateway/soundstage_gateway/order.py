"""An order: what a request asks for, checked whole and with every default filled in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from soundstage.music.v1.composer_service_pb2 import PlanSongRequest, PolishSongRequest
from soundstage.music.v1.song_service_pb2 import GenerateSongRequest, PlannerOptions
from soundstage.type.v1.audio_pb2 import SAMPLE_FORMAT_F32, SAMPLE_FORMAT_S16, SampleFormat
from soundstage.type.v1.options_pb2 import DiffusionOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_runtime.score import CODE_RATE_HZ, DURATION_RANGE_S, INSTRUMENTAL
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks

MAX_VARIANTS = 8
MIN_CODES = CODE_RATE_HZ
MAX_CODES = int(DURATION_RANGE_S[1]) * CODE_RATE_HZ
SAMPLE_FORMATS = (SAMPLE_FORMAT_S16, SAMPLE_FORMAT_F32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A valid request. `seeds` has one entry for every variant; `codes` are the user's own."""

    caption: str
    lyrics: str
    metadata: SongMetadata
    is_planned: bool
    planner: PlannerOptions
    codes: tuple[int, ...]
    diffusion: DiffusionOptions
    sample_format: SampleFormat.ValueType
    seeds: tuple[int, ...]


def read_order(
    request: GenerateSongRequest, *, draw_seed: Callable[[], int], max_variants: int = MAX_VARIANTS
) -> Order:
    """Check every field and fill in what is left open; raises InvalidRequestError naming all that are bad."""
    checks = Checks()
    check_words(checks, request)
    metadata = checks.metadata(request.metadata)
    checks.sampling(request.planner.sampling, field="planner.sampling")
    checks.diffusion(request.diffusion, field="diffusion")
    check_codes(checks, "codes", request.codes)
    if 0 < len(request.codes) < MIN_CODES:
        checks.refuse("codes", f"has {len(request.codes)} entries; at least {MIN_CODES}, a second of music")
    planner = request.planner
    is_planned = not request.codes and (planner.enabled or not planner.HasField("enabled"))
    is_free = is_planned and (planner.write_metadata or not planner.HasField("write_metadata"))
    if not (is_free or request.codes or request.metadata.HasField("duration_s")):
        checks.refuse("metadata.duration_s", "is not set; nobody else chooses it when the planner writes no metadata")
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
        metadata=metadata,
        is_planned=is_planned,
        planner=planner,
        codes=tuple(request.codes),
        diffusion=request.diffusion,
        sample_format=sample_format,
        seeds=tuple(request.seeds) + tuple(draw_seed() for _ in range(variants - len(request.seeds))),
    )


def check_words(checks: Checks, request: GenerateSongRequest | PlanSongRequest | PolishSongRequest) -> None:
    """Check what a request says in words."""
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    if not request.caption.strip() and not request.lyrics.strip():
        checks.refuse("caption", "is empty, and so is lyrics; say in one of them what to make")
    if not isinstance(request, PolishSongRequest) and request.instrumental and request.lyrics.strip():
        checks.refuse("lyrics", "must be empty when instrumental is true")


def check_codes(checks: Checks, field: str, codes: Sequence[int]) -> None:
    """Check audio codes, if there are any."""
    if len(codes) > MAX_CODES:
        checks.refuse(field, f"has {len(codes)} entries; at most {MAX_CODES}")
    checks.codes(field, codes)
