"""What is told of an adapter."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """A loaded adapter of one model; `kind` is "lora" or "lokr", `rank` the largest of its layers'."""

    name: str
    model_fingerprint: str
    kind: str
    rank: int
    size_bytes: int
