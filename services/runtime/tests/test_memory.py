import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundstage_runtime.memory import Memory, parse_memory


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("6GiB", Memory(size_bytes=6 << 30)),
        ("1.5 gib", Memory(size_bytes=3 << 29)),
        ("512MiB", Memory(size_bytes=512 << 20)),
        ("6GB", Memory(size_bytes=6 * 10**9)),
        (" 10 mb ", Memory(size_bytes=10**7)),
        ("0.5", Memory(fraction=0.5)),
        ("1", Memory(fraction=1.0)),
    ],
)
def test_sizes_and_fractions_are_read(text: str, memory: Memory) -> None:
    assert parse_memory(text) == memory


@pytest.mark.parametrize("text", ["", "0", "6", "1.01", "-1GiB", "6 TiB", "0GiB", "nan", "all", "0x10MiB", "1e3MB"])
def test_anything_else_is_refused_with_what_would_do(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory: must be a size above 0 such as 6GiB") as caught:
        parse_memory(text)
    assert repr(text) in str(caught.value)


@given(
    st.integers(1, 1 << 40), st.one_of(st.integers(1, 1 << 40).map(lambda size: f"{size / 1000:.3f}MB"), st.just("0.3"))
)
def test_it_is_never_more_than_there_is(total_bytes: int, text: str) -> None:
    assert 0 <= parse_memory(text.replace("0.000MB", "1MB")).of(total_bytes) <= total_bytes
