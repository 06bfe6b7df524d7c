import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from numpy.typing import NDArray

from soundstage.type.v1.tensor_pb2 import (
    DATA_TYPE_BFLOAT16,
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    DATA_TYPE_UNSPECIFIED,
    DataType,
    Tensor,
)
from soundstage_runtime.errors import InvalidRequestError
from soundstage_runtime.tensors import from_proto, latent_chunks, to_proto

Floats = NDArray[np.float32]

shapes = np_st.array_shapes(min_dims=1, max_dims=4, max_side=5)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
float32_arrays = np_st.arrays(np.float32, shapes, elements=finite)


def round_trip(array: Floats, data_type: DataType.ValueType) -> Floats:
    return from_proto(to_proto(array, data_type), "x", shape=(None,) * array.ndim)


@given(float32_arrays)
def test_float32_keeps_every_bit(array: Floats) -> None:
    assert round_trip(array, DATA_TYPE_FLOAT32).tobytes() == array.tobytes()


@given(np_st.arrays(np.float32, shapes, elements=st.floats(-60_000, 60_000, width=32)))
def test_float16_rounds_as_numpy_does(array: Floats) -> None:
    assert np.array_equal(round_trip(array, DATA_TYPE_FLOAT16), array.astype(np.float16).astype(np.float32))


@given(np_st.arrays(np.uint32, shapes, elements=st.integers(0, 2**32 - 1)))
def test_bfloat16_words_are_those_of_torch(bits: NDArray[np.uint32]) -> None:
    array = bits.view(np.float32)
    words = np.frombuffer(to_proto(array, DATA_TYPE_BFLOAT16).data, "<u2")
    theirs = torch.from_numpy(array.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).ravel()
    numbers = ~np.isnan(array).ravel()
    assert np.array_equal(words[numbers], theirs[numbers])


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000])
def test_bfloat16_keeps_nan_a_nan(bits: int) -> None:
    nan = np.array([bits], np.uint32).view(np.float32)
    word = int(np.frombuffer(to_proto(nan, DATA_TYPE_BFLOAT16).data, "<u2")[0])
    assert word & 0x7F80 == 0x7F80
    assert word & 0x007F


@given(float32_arrays)
def test_bfloat16_is_a_fixed_point_of_itself(array: Floats) -> None:
    small = np.clip(array, -1e38, 1e38)  # the largest float32 values round up to infinity, which is refused
    once = round_trip(small, DATA_TYPE_BFLOAT16)
    assert np.array_equal(round_trip(once, DATA_TYPE_BFLOAT16), once)


def test_a_strided_array_is_written_row_by_row() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert np.array_equal(round_trip(array, DATA_TYPE_FLOAT32), array)


@pytest.mark.parametrize(
    ("tensor", "violation"),
    [
        (Tensor(data_type=DATA_TYPE_UNSPECIFIED, shape=[1, 2], data=bytes(8)), "x.data_type is 0; must be one of "),
        (Tensor(data_type=77, shape=[1, 2], data=bytes(8)), "x.data_type is 77; "),  # pyright: ignore[reportArgumentType]
        (Tensor(data_type=DATA_TYPE_FLOAT32, shape=[2], data=bytes(8)), "x.shape is [2]; must be [1 or more, 2]"),
        (
            Tensor(data_type=DATA_TYPE_FLOAT32, shape=[1, 3], data=bytes(12)),
            "x.shape is [1, 3]; must be [1 or",
        ),
        (Tensor(data_type=DATA_TYPE_FLOAT32, shape=[0, 2]), "x.shape is [0, 2]; must be [1 or more, 2]"),
        (
            Tensor(data_type=DATA_TYPE_FLOAT32, shape=[1] * 5, data=bytes(4)),
            "x.shape is [1, 1, 1, 1, 1]; must",
        ),
        (Tensor(data_type=DATA_TYPE_FLOAT32, shape=[1, 2], data=bytes(7)), "x.data holds 7 bytes; [1, 2] takes 8"),
        (Tensor(data_type=DATA_TYPE_FLOAT16, shape=[1, 2], data=bytes(8)), "x.data holds 8 bytes; [1, 2] takes 4"),
        (
            Tensor(data_type=DATA_TYPE_FLOAT32, shape=[2**32 - 1, 2], data=bytes(8)),
            "x.data holds 8 bytes; [4294967295, 2] takes 34359738360",
        ),
        (to_proto(np.array([[0, np.nan]], np.float32)), "x.data holds NaN or infinity"),
        (to_proto(np.array([[0, -np.inf]], np.float32), DATA_TYPE_BFLOAT16), "x.data holds NaN or infinity"),
    ],
)
def test_a_bad_tensor_is_refused_by_field(tensor: Tensor, violation: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        from_proto(tensor, "x", shape=(None, 2))
    (found,) = caught.value.violations
    assert f"{found.field} {found.description}".startswith(violation)


@given(st.binary(max_size=64), st.lists(st.integers(0, 5), max_size=5), st.integers(0, 4))
def test_any_bytes_are_read_or_refused_and_nothing_else(data: bytes, shape: list[int], data_type: int) -> None:
    tensor = Tensor(data_type=data_type, shape=shape, data=data)  # pyright: ignore[reportArgumentType]
    try:
        array = from_proto(tensor, "x", shape=(None, None))
    except InvalidRequestError:
        return
    assert list(array.shape) == shape
    assert array.dtype == np.float32


def test_latents_are_cut_into_chunks_without_gap() -> None:
    latents = np.random.default_rng(0).standard_normal((600, 64)).astype(np.float32)
    chunks = latent_chunks(latents, DATA_TYPE_FLOAT32)
    assert [(chunk.first_frame, chunk.tensor.shape[0]) for chunk in chunks] == [(0, 256), (256, 256), (512, 88)]
    joined = np.concatenate([from_proto(chunk.tensor, "x", shape=(None, 64)) for chunk in chunks])
    assert np.array_equal(joined, latents)


def test_all_that_is_wrong_with_a_tensor_is_named_at_once() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        from_proto(Tensor(data_type=9, shape=[3], data=bytes(7)), "x", shape=(None, 2))  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == ["x.data_type", "x.shape"]
