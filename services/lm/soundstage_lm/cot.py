"""The planner's chain of thought: metadata as YAML between `<think>` tags, as the model was trained on it."""

import re
from typing import Final

import yaml

from soundstage_lm.brief import Metadata

START: Final = "<think>"
END: Final = "</think>"
KEYS: Final = {
    "bpm": "bpm",
    "caption": "caption",
    "duration": "duration_s",
    "genres": "genres",
    "keyscale": "key_scale",
    "language": "vocal_language",
    "timesignature": "time_signature",
}
_QUOTED: Final = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def dump(metadata: Metadata) -> str:
    """Write what stands between the tags, newlines included: the training text, to the byte.

    Genres are left out: the model writes them, but is never told any.
    """
    told = {key: getattr(metadata, name) for key, name in KEYS.items() if key != "genres"}
    return "\n" + ("".join(line(key, value) for key, value in told.items() if value is not None) or "\n")


def line(key: str, value: str | float) -> str:
    """Write a field with its newline; a long value takes several lines."""
    # PyYAML's own rules (quoting, folding at 80 columns) made the training data.
    return yaml.dump({key: _trained(key, value)}, allow_unicode=True)


def _trained(key: str, value: str | float) -> str | int:
    """Reduce a value to its trained form: whole seconds, quarters without `/4`, digits as a number."""
    if not isinstance(value, str):
        return int(value)
    if key == "timesignature":
        value = value.removesuffix("/4")
    return int(value) if value.isascii() and value.isdigit() else value


def read_fields(inside: str) -> dict[str, str]:
    """Read what stands between the tags, in the order written, names as in Metadata; unknown fields are left out."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for written in inside.split("\n"):
        key, colon, value = written.partition(":")
        if written.startswith("<"):
            lines = []
        elif written[:1].strip() and colon:
            lines = found.setdefault(key.strip(), [])
            lines[:] = [value.strip(" ")]
        else:
            lines.append(written.strip(" "))
    return {KEYS[key]: _unquote(lines) for key, lines in found.items() if key in KEYS}


def parse(inside: str) -> Metadata:
    """Read the metadata between the tags; empty values and numbers that are none are left out."""
    fields = read_fields(inside)
    bpm, duration = fields.pop("bpm", ""), fields.pop("duration_s", "")
    return Metadata(
        bpm=int(bpm) if bpm.isdecimal() else None,
        duration_s=float(duration) if duration.isdecimal() else None,
        **{name: value for name, value in fields.items() if value},
    )


def _unquote(lines: list[str]) -> str:
    if _QUOTED.fullmatch("\n".join(lines).rstrip("\n")):
        try:
            value: object = yaml.load("\n ".join(lines), Loader=yaml.BaseLoader)
        except (yaml.YAMLError, ValueError, OverflowError):
            value = None  # an escape that names no character is just characters
        if isinstance(value, str):
            return value
    return " ".join(part for part in lines if part)
