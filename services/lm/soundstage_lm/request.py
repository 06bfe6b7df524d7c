"""The requests of LmService, read and checked field by field."""

from collections.abc import Sequence
from dataclasses import replace

from soundstage.stage.v1.lm_service_pb2 import (
    ComposeRequest,
    DraftRequest,
    PolishRequest,
    ScoreRequest,
    UnderstandRequest,
)
from soundstage.type.v1.options_pb2 import SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_lm.brief import Brief, Claim, Idea, Listening, Metadata, Rough, Sampling
from soundstage_runtime.score import CODE_RATE_HZ, SPREAD_RANGE
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks


def read_compose(request: ComposeRequest, *, max_duration_s: float) -> Brief:
    """Turn a request into a brief; raises InvalidRequestError naming every bad field."""
    checks = Checks()
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    metadata = checks.metadata(request.metadata, max_duration_s=max_duration_s)
    checks.sampling(request.sampling, field="sampling")
    checks.finish()
    switches = ("write_metadata", "write_codes", "rewrite_caption", "detect_language")
    return Brief(
        caption=request.caption,
        lyrics=request.lyrics,
        metadata=_read_metadata(metadata),
        seed=request.seed,
        sampling=_read_sampling(request.sampling),
        **{name: getattr(request, name) for name in switches if request.HasField(name)},
    )


def read_understand(request: UnderstandRequest, *, max_duration_s: float) -> Listening:
    """Turn a request into codes to describe; raises InvalidRequestError."""
    checks = Checks()
    _check_length(checks, request.codes, max_duration_s)
    checks.sampling(request.sampling, field="sampling")
    checks.finish()
    return Listening(codes=tuple(request.codes), seed=request.seed, sampling=_read_sampling(request.sampling))


def read_draft(request: DraftRequest) -> Idea:
    """Turn a request into an idea; raises InvalidRequestError."""
    checks = Checks()
    checks.text("query", request.query, max_chars=MAX_CAPTION_CHARS)
    language = checks.language("vocal_language", request.vocal_language) if request.vocal_language else "unknown"
    checks.sampling(request.sampling, field="sampling")
    checks.finish()
    return Idea(
        query=request.query,
        is_instrumental=request.instrumental,
        vocal_language=None if language == "unknown" else language,
        seed=request.seed,
        sampling=_read_sampling(request.sampling),
    )


def read_polish(request: PolishRequest, *, max_duration_s: float) -> Rough:
    """Turn a request into a text to write better; raises InvalidRequestError."""
    checks = Checks()
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    metadata = checks.metadata(request.metadata, max_duration_s=max_duration_s)
    checks.sampling(request.sampling, field="sampling")
    checks.finish()
    return Rough(
        caption=request.caption,
        lyrics=request.lyrics,
        metadata=_read_metadata(metadata),
        seed=request.seed,
        sampling=_read_sampling(request.sampling),
    )


def read_score(request: ScoreRequest, *, max_duration_s: float) -> Claim:
    """Turn a request into words said of codes; raises InvalidRequestError."""
    checks = Checks()
    _check_length(checks, request.codes, max_duration_s)
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    metadata = checks.metadata(request.metadata)
    if not (request.caption.strip() or request.lyrics.strip() or metadata.ListFields()):
        checks.refuse("caption", "is empty, and so are lyrics and metadata; say in one of them what to score")
    if request.HasField("spread"):
        checks.number("spread", request.spread, *SPREAD_RANGE)
    checks.finish()
    claim = Claim(
        codes=tuple(request.codes),
        caption=request.caption.strip(),
        lyrics=request.lyrics.strip(),
        metadata=_read_metadata(metadata),
    )
    return replace(claim, spread=request.spread) if request.HasField("spread") else claim


def _check_length(checks: Checks, codes: Sequence[int], max_duration_s: float) -> None:
    most = int(max_duration_s * CODE_RATE_HZ)
    if not 1 <= len(codes) <= most:
        checks.refuse("codes", f"has {len(codes)} entries; must have 1 to {most}")
    checks.codes("codes", codes)


def _read_metadata(metadata: SongMetadata) -> Metadata:
    return Metadata(**{field.name: value for field, value in metadata.ListFields()})


def _read_sampling(sampling: SamplingOptions) -> Sampling:
    return Sampling(**{field.name: value for field, value in sampling.ListFields()})
