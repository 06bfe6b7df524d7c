"""The requests of LmService, read and checked field by field."""

from soundstage.stage.v1.lm_service_pb2 import ComposeRequest, DraftRequest, PolishRequest, UnderstandRequest
from soundstage.type.v1.options_pb2 import SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_lm.brief import Brief, Idea, Listening, Metadata, Rough, Sampling
from soundstage_runtime.score import CODE_RATE_HZ
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
    most = int(max_duration_s * CODE_RATE_HZ)
    if not 1 <= len(request.codes) <= most:
        checks.refuse("codes", f"has {len(request.codes)} entries; must have 1 to {most}")
    checks.codes("codes", request.codes)
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


def _read_metadata(metadata: SongMetadata) -> Metadata:
    return Metadata(**{field.name: value for field, value in metadata.ListFields()})


def _read_sampling(sampling: SamplingOptions) -> Sampling:
    return Sampling(**{field.name: value for field, value in sampling.ListFields()})
