"""The planner's chain of thought: metadata as YAML between `<think>` tags, as the model was trained on it."""

from typing import Final

import yaml

from soundstage_lm.brief import Metadata

START: Final = "<think>"
END: Final = "</think>"
KEYS: Final = {
    "bpm": "bpm",
    "caption": "caption",
    "duration": "duration_s",
    "keyscale": "key_scale",
    "language": "vocal_language",
    "timesignature": "time_signature",
}


def dump(metadata: Metadata) -> str:
    """Write what stands between the tags, newlines included: the training text, to the byte."""
    fields = {
        key: line_value(key, value) for key, name in KEYS.items() if (value := getattr(metadata, name)) is not None
    }
    # PyYAML's own rules (quoting, folding at 80 columns) made the training data.
    text = yaml.dump(fields, allow_unicode=True, sort_keys=True).strip() if fields else ""
    return f"\n{text}\n"


def line_value(key: str, value: str | float) -> str | int:
    """Reduce a field's value to its trained form: whole seconds, quarters without `/4`, digits as a number."""
    if not isinstance(value, str):
        return int(value)
    if key == "timesignature":
        value = value.removesuffix("/4")
    return int(value) if value.isascii() and value.isdigit() else value


def parse(text: str) -> Metadata:
    """Read metadata from what the model wrote; unknown fields and values that are no numbers are left out.

    The closing tag may be missing, because the model ends its turn where metadata alone was asked for.
    """
    inside = text.rpartition(START)[2].partition(END)[0]
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in inside.split("\n"):
        key, colon, value = line.partition(":")
        if line.startswith("<"):
            lines = []
        elif line[:1].strip() and colon:
            lines = found.setdefault(key.strip(), [])
            lines[:] = [value.strip(" ")]
        else:
            lines.append(line.strip(" "))
    fields = {name: _unquote(found[key]) for key, name in KEYS.items() if key in found}
    bpm, duration = fields.pop("bpm", ""), fields.pop("duration_s", "")
    return Metadata(
        bpm=int(bpm) if bpm.isdecimal() else None,
        duration_s=float(duration) if duration.isdecimal() else None,
        **{name: value for name, value in fields.items() if value},
    )


def _unquote(lines: list[str]) -> str:
    if lines[0][:1] in ("'", '"'):
        try:
            value: object = yaml.load("\n ".join(lines), Loader=yaml.BaseLoader)
        except yaml.YAMLError:
            value = None  # a quote the model forgot to close is just a character
        if isinstance(value, str):
            return value
    return " ".join(line for line in lines if line)
