"""The encoder's own ways against diffusers'."""

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

from soundstage_vae.codec import Codec
from soundstage_vae.decoder import PIECE_CONTEXT


def draw_audio(num_samples: int) -> torch.Tensor:
    return 0.3 * torch.randn(2, 2, num_samples, generator=torch.Generator().manual_seed(4))


@torch.inference_mode()
@pytest.mark.parametrize("num_samples", [1920, 9600, 9607, 11_519])
@pytest.mark.parametrize("piece_steps", [128, 1024])
def test_pieces_join_to_the_whole(codec: Codec, oracle: AutoencoderOobleck, num_samples: int, piece_steps: int) -> None:
    audio = draw_audio(num_samples)
    whole = oracle.encoder(audio)
    torch.testing.assert_close(codec.encoder(audio, piece_steps=piece_steps), whole, rtol=0, atol=1e-5)
    assert torch.equal(codec.encoder(audio), whole)


@torch.inference_mode()
def test_the_head_hears_no_further_than_its_context(codec: Codec) -> None:
    hears: list[int] = []
    for sample in range(8):
        audio = torch.zeros(1, 2, 8 * (2 * PIECE_CONTEXT + 3))
        audio[:, :, 8 * (PIECE_CONTEXT + 1) + sample] = torch.nan
        poisoned = codec.encoder.head(audio).isnan().any(dim=1)[0].nonzero() - (PIECE_CONTEXT + 1)
        hears += [int(poisoned.min()), int(poisoned.max())]
    assert (min(hears), max(hears)) == (-PIECE_CONTEXT, PIECE_CONTEXT)
