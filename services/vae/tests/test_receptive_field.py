"""How far one frame is heard. Structure alone decides it, so the tiny weights tell for the real ones."""

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from numpy.typing import NDArray

from soundstage_vae.codec import Codec
from soundstage_vae.tiling import DECODE_CONTEXT, ENCODE_CONTEXT, plan_tiles

DECODER_REACH = 16_005  # samples, each side of a latent frame
ENCODER_REACH = 12_165


def test_a_latent_frame_is_heard_no_further_than_the_decoders_context(oracle: AutoencoderOobleck) -> None:
    latents = torch.zeros(1, 64, 33)
    latents[:, :, 16] = torch.nan
    poisoned = oracle.decoder(latents).isnan().any(dim=1)[0].nonzero()
    assert (int(poisoned.min()), int(poisoned.max())) == (14_715, 48_644)
    assert int(poisoned.min()) == 16 * 1920 - DECODER_REACH
    assert len(poisoned) == 1920 + 2 * DECODER_REACH
    assert DECODE_CONTEXT == -(-DECODER_REACH // 1920)


def test_the_encoder_hears_no_further_than_its_context(oracle: AutoencoderOobleck) -> None:
    first, last = 8 * 1920 - ENCODER_REACH, 9 * 1920 - 1 + ENCODER_REACH
    audio = torch.zeros(4, 2, 17 * 1920)
    for item, sample in enumerate((first - 1, first, last, last + 1)):
        audio[item, :, sample] = torch.nan
    hears = oracle.encoder(audio).isnan().any(dim=1)[:, 8]
    assert hears.tolist() == [False, True, True, False]
    assert ENCODE_CONTEXT == -(-ENCODER_REACH // 1920)


def test_one_frame_less_of_context_changes_the_audio(codec: Codec) -> None:
    latents = np.random.default_rng(5).standard_normal((60, 64)).astype(np.float32)
    whole = codec.decode(latents)
    # Unlike window lengths may take unlike kernels: 1e-5 is far above that noise, far below what a lost frame does.
    assert np.abs(_decode_tiled(codec, latents, DECODE_CONTEXT) - whole).max() < 1e-5
    assert np.abs(_decode_tiled(codec, latents, DECODE_CONTEXT - 1) - whole).max() > 1e-5


def _decode_tiled(codec: Codec, latents: NDArray[np.float32], context: int) -> NDArray[np.float32]:
    return np.concatenate(
        [
            codec.decode(latents[tile.window_start : tile.window_stop], tile.core)
            for tile in plan_tiles(len(latents), windows=(32,), context=context)
        ]
    )
