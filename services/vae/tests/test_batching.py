from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from soundstage_vae.batching import choose_batches
from soundstage_vae.codec import Codec


class InexactAt:
    """A decoder whose batches of one length and number differ from their windows alone."""

    def __init__(self, frames: int, batch: int) -> None:
        self.inexact, self.asked = (frames, batch), list[tuple[int, int]]()

    def is_batching_exact(self, window_frames: int, batch: int) -> bool:
        self.asked.append((window_frames, batch))
        return (window_frames, batch) != self.inexact


@pytest.mark.parametrize(
    ("inexact", "max_batch", "chosen", "asked"),
    [
        ((0, 0), 3, {32: 3, 64: 3}, [(32, 2), (32, 3), (64, 2), (64, 3)]),
        ((64, 2), 3, {32: 3, 64: 1}, [(32, 2), (32, 3), (64, 2)]),
        ((32, 3), 4, {32: 2, 64: 4}, [(32, 2), (32, 3), (64, 2), (64, 3), (64, 4)]),
        ((32, 1), 1, {32: 1, 64: 1}, []),
    ],
)
def test_tiles_share_a_forward_only_where_that_many_were_tried_and_leave_no_trace(
    inexact: tuple[int, int], max_batch: int, chosen: dict[int, int], asked: Sequence[tuple[int, int]]
) -> None:
    decoder = InexactAt(*inexact)
    assert choose_batches(decoder, (32, 64), max_batch) == chosen
    assert decoder.asked == asked


def test_the_codec_tells_whether_a_batch_leaves_a_trace(tiny_vae: Path) -> None:
    codec = Codec(tiny_vae, device=torch.device("cpu"), dtype=torch.float32)
    assert codec.is_batching_exact(20, 1)

    def louder_together(_module: torch.nn.Module, _arguments: object, audio: torch.Tensor) -> torch.Tensor:
        return audio * len(audio)

    codec.decoder.register_forward_hook(louder_together)
    assert not codec.is_batching_exact(20, 2)
