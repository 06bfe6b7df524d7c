import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage_runtime.text import control_tokens, is_control_token, without_control_tokens

TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|audio_code_0|>", "<think>", "</think>", "<tool_call>"]


@pytest.mark.parametrize("token", TOKENS)
def test_a_control_token_is_found_inside_words(token: str) -> None:
    assert control_tokens(f"la{token}la") == [token]
    assert is_control_token(token)


@pytest.mark.parametrize(
    "text", ["", "[verse]\nI <3 you", "a < b | c > d", "<| im_start |>", "<thinking>", "<||>", "< think>"]
)
def test_what_only_looks_like_one_is_a_word(text: str) -> None:
    assert control_tokens(text) == []
    assert not is_control_token(text)


@given(st.text(alphabet="<|>ab /_", max_size=30), st.sampled_from(TOKENS), st.text(max_size=10))
def test_no_words_around_it_hide_a_control_token(before: str, token: str, after: str) -> None:
    assert token in control_tokens(before + token + after)


def test_all_are_listed_in_order() -> None:
    assert control_tokens("<think>a</think><|im_end|>") == ["<think>", "</think>", "<|im_end|>"]


def test_a_token_within_other_words_is_not_a_token_itself() -> None:
    assert not is_control_token("x<|im_end|>")


def test_takes_control_tokens_out_until_none_is_left() -> None:
    assert without_control_tokens("a<|im_<think>end|>b </th</think>ink>c <3") == "ab c <3"
