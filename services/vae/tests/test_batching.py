from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from soundstage_vae.batching import choose_batch
from soundstage_vae.codec import Codec


class InexactAt:
    """A decoder whose batches of one length differ from their windows alone; it writes down what it was asked."""

    def __init__(self, frames: int) -> None:
        self.frames, self.asked = frames, list[tuple[int, int]]()

    def is_batching_exact(self, window_frames: int, batch: int) -> bool:
        self.asked.append((window_frames, batch))
        return window_frames != self.frames


@pytest.mark.parametrize(
    ("inexact", "max_batch", "chosen", "asked"),
    [
        (0, 4, 4, [(32, 4), (64, 4), (128, 4)]),
        (64, 4, 1, [(32, 4), (64, 4)]),
        (32, 1, 1, []),
    ],
)
def test_tiles_share_a_forward_only_where_it_leaves_no_trace(
    inexact: int, max_batch: int, chosen: int, asked: Sequence[tuple[int, int]]
) -> None:
    decoder = InexactAt(inexact)
    assert choose_batch(decoder, (32, 64, 128), max_batch) == chosen
    assert decoder.asked == asked


def test_the_codec_tells_whether_a_batch_leaves_a_trace(tiny_vae: Path) -> None:
    codec = Codec(tiny_vae, device=torch.device("cpu"), dtype=torch.float32)
    assert codec.is_batching_exact(4, 1)

    def louder_together(_module: torch.nn.Module, _arguments: object, audio: torch.Tensor) -> torch.Tensor:
        return audio * len(audio)

    codec.decoder.register_forward_hook(louder_together)
    assert not codec.is_batching_exact(4, 2)
