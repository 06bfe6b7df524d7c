"""What is tried when memory runs out. The codec's forward is made to run out as often as a test asks."""

from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from structlog.testing import capture_logs

from soundstage_device.worker import DeviceMemoryError
from soundstage_vae.codec import Codec
from soundstage_vae.memory import WINDOWS, choose_window, first_that_fits

WINDOW = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)


def run_out(half: torch.nn.Module, times: int) -> None:
    """Let a half of the codec run out of memory so many times, on the device and on the host alike."""
    left = [times]

    def hook(_module: torch.nn.Module, _arguments: object) -> None:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory, as the test asks")

    half.register_forward_pre_hook(hook)


@pytest.fixture
def scarce(tiny_vae: Path) -> Codec:
    return Codec(tiny_vae, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("times", "tried"),
    [
        (0, []),
        (1, ["on the device"]),
        (2, ["on the device", "again"]),
        (3, ["on the device", "again", "in smaller pieces"]),
    ],
)
def test_a_tile_that_does_not_fit_is_decoded_in_less_memory(
    scarce: Codec, codec: Codec, times: int, tried: list[str]
) -> None:
    run_out(scarce.decoder, times)
    with capture_logs() as logs:
        samples = scarce.decode(WINDOW)
    assert [log["tried"] for log in logs] == tried
    assert all(log["log_level"] == "warning" for log in logs)
    np.testing.assert_allclose(samples, codec.decode(WINDOW), rtol=0, atol=1e-6)


def test_a_batch_that_does_not_fit_is_decoded_one_by_one(scarce: Codec, codec: Codec) -> None:
    run_out(scarce.decoder, 1)
    with capture_logs() as logs:
        decoded = scarce.decode_batch([WINDOW, WINDOW[::-1]])
    assert [(log["what"], log["tried"]) for log in logs] == [("a batch of 2 tiles of 8 latent frames", "on the device")]
    for samples, window in zip(decoded, (WINDOW, WINDOW[::-1]), strict=True):
        assert isinstance(samples, np.ndarray)
        assert np.array_equal(samples, codec.decode(window))


def test_a_tile_that_fits_nowhere_is_refused_and_the_next_is_decoded(scarce: Codec, codec: Codec) -> None:
    run_out(scarce.decoder, 4)
    with pytest.raises(DeviceMemoryError, match="a smaller window_frames of the codec would do") as caught:
        scarce.decode(WINDOW)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert np.array_equal(scarce.decode(WINDOW), codec.decode(WINDOW))


def test_an_encoding_that_does_not_fit_is_tried_again_and_then_refused(scarce: Codec, codec: Codec) -> None:
    audio = np.random.default_rng(4).uniform(-0.3, 0.3, (1920, 2)).astype(np.float32)
    run_out(scarce.encoder, 3)
    with pytest.raises(DeviceMemoryError, match="an encoding of 1920 samples does not fit"):
        scarce.encode(audio)
    for found, wanted in zip(scarce.encode(audio), codec.encode(audio), strict=True):
        assert np.array_equal(found, wanted)


def test_the_host_decodes_a_narrow_codec_in_float32(tiny_vae: Path, codec: Codec) -> None:
    narrow = Codec(tiny_vae, device=torch.device("cpu"), dtype=torch.bfloat16)
    run_out(narrow.decoder, 3)
    # The weights have been rounded to 8 bits, the arithmetic is not.
    assert 0 < np.abs(narrow.decode(WINDOW) - codec.decode(WINDOW)).max() < 0.05
    assert narrow.decoder.tail[-1].weight.dtype == torch.bfloat16


def test_other_failures_are_not_taken_for_a_lack_of_memory() -> None:
    tried: list[str] = []

    def fail() -> NDArray[np.float32]:
        tried.append("once")
        raise RuntimeError("the device is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        first_that_fits([("first", fail), ("second", fail)], relieve=lambda: None, what="a tile")
    assert tried == ["once"]


def test_the_tensors_of_an_attempt_are_let_go_before_the_next() -> None:
    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    def fail() -> int:
        held = Held()
        raise torch.OutOfMemoryError(f"{held} does not fit")

    alive: list[int] = []
    with pytest.raises(DeviceMemoryError):
        first_that_fits([("first", fail)], relieve=lambda: alive.append(Held.alive), what="a tile")
    assert alive == [0]


@pytest.mark.parametrize(
    "fail", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytes(2**60)], ids=["torch on the host", "python"]
)
def test_the_hosts_own_lack_of_memory_counts_too(fail: Callable[[], object]) -> None:
    assert first_that_fits([("first", fail), ("second", lambda: 7)], relieve=lambda: None, what="a tile") == 7


@pytest.mark.parametrize(
    ("free_bytes", "window"),
    [(0, 64), (64_000, 64), (256_000, 128), (511_999, 128), (1_536_000 * 2, 1536), (10**9, 1536)],
)
def test_the_window_grows_with_free_memory(free_bytes: int, window: int) -> None:
    assert choose_window(free_bytes, lambda frames: 1000 * frames) == window
    assert window in WINDOWS
