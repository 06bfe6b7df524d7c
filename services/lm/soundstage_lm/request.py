"""ComposeRequest, read and checked field by field."""

from soundstage.stage.v1.lm_service_pb2 import ComposeRequest
from soundstage.type.v1.options_pb2 import SamplingOptions
from soundstage.type.v1.score_pb2 import SongMetadata
from soundstage_lm.brief import Brief, Metadata, Sampling
from soundstage_runtime.validation import MAX_CAPTION_CHARS, MAX_LYRICS_CHARS, Checks


def read_request(request: ComposeRequest, *, max_duration_s: float) -> Brief:
    """Turn a request into a brief; raises InvalidRequestError naming every bad field."""
    checks = Checks()
    checks.text("caption", request.caption, max_chars=MAX_CAPTION_CHARS)
    checks.text("lyrics", request.lyrics, max_chars=MAX_LYRICS_CHARS)
    checks.metadata(request.metadata, max_duration_s=max_duration_s)
    checks.sampling(request.sampling, field="sampling")
    checks.finish()
    return Brief(
        caption=request.caption,
        lyrics=request.lyrics,
        metadata=_read_metadata(request.metadata),
        seed=request.seed,
        sampling=_read_sampling(request.sampling),
    )


def _read_metadata(metadata: SongMetadata) -> Metadata:
    return Metadata(**{field.name: value for field, value in metadata.ListFields()})


def _read_sampling(sampling: SamplingOptions) -> Sampling:
    return Sampling(**{field.name: value for field, value in sampling.ListFields()})
