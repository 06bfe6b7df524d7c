"""Control tokens in text: what a tokenizer would read as a command instead of a word."""

import re

_CONTROL_TOKEN = re.compile(r"<\|[^<>|\s]{1,64}\|>|</?(?:think|tool_call|tool_response)>")


def control_tokens(text: str) -> list[str]:
    """List the control tokens of the Qwen family that stand in a text, such as `<|im_end|>` or `<think>`."""
    return _CONTROL_TOKEN.findall(text)


def is_control_token(token: str) -> bool:
    """Say whether a tokenizer's added token is one that `control_tokens` finds."""
    return _CONTROL_TOKEN.fullmatch(token) is not None


def without_control_tokens(text: str) -> str:
    """Take the control tokens out of a text, and those that appear when others are gone."""
    while found := _CONTROL_TOKEN.search(text):
        text = text[: found.start()] + text[found.end() :]
    return text
