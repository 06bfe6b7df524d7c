"""The decoder's own ways against diffusers'."""

from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

from soundstage_vae.codec import Codec
from soundstage_vae.decoder import MIDDLE_CONTEXT, PIECE_CONTEXT, Decoder, copy_to_host


@pytest.fixture
def decoder(codec: Codec) -> Decoder:
    return codec.decoder


@torch.inference_mode()
@pytest.mark.parametrize("piece_steps", [128, 1024])
def test_pieces_join_to_the_whole(decoder: Decoder, oracle: AutoencoderOobleck, piece_steps: int) -> None:
    latents = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(4))
    whole = oracle.decoder(latents)
    torch.testing.assert_close(decoder(latents, piece_steps=piece_steps), whole, rtol=0, atol=1e-6)
    assert torch.equal(decoder(latents), whole)


@torch.inference_mode()
def test_the_tail_hears_no_further_than_its_context(decoder: Decoder) -> None:
    steps = torch.zeros(1, 8, 2 * PIECE_CONTEXT + 3)
    middle = PIECE_CONTEXT + 1
    steps[:, :, middle] = torch.nan
    poisoned = decoder.tail(steps).isnan().any(dim=1)[0].nonzero() // 8
    assert (int(poisoned.min()), int(poisoned.max())) == (middle - PIECE_CONTEXT, middle + PIECE_CONTEXT)


@torch.inference_mode()
def test_the_middle_hears_no_further_than_its_context(decoder: Decoder) -> None:
    steps = torch.zeros(1, 8, 2 * MIDDLE_CONTEXT + 3)
    middle = MIDDLE_CONTEXT + 1
    steps[:, :, middle] = torch.nan
    poisoned = decoder.middle(steps).isnan().any(dim=1)[0].nonzero()  # of 24 steps for each
    before, after = middle * 24 - int(poisoned.min()), int(poisoned.max()) + 1 - (middle + 1) * 24
    reach = max(before, after) + PIECE_CONTEXT  # of which a sample of the tail may hear the last
    assert (MIDDLE_CONTEXT - 1) * 24 < reach <= MIDDLE_CONTEXT * 24


@torch.inference_mode()
@pytest.mark.parametrize("core", [range(30), range(0, 21), range(9, 21), range(9, 30), range(14, 15), range(29, 30)])
def test_a_core_has_the_sound_that_the_whole_has_there(decoder: Decoder, core: range) -> None:
    latents = torch.randn(2, 64, 30, generator=torch.Generator().manual_seed(5))
    samples = slice(core.start * 1920, core.stop * 1920)
    found = decoder(latents, core=core, piece_steps=1024)
    # Unlike lengths may take unlike kernels: 1e-5 is above that noise, and far below what a lost step does.
    torch.testing.assert_close(found, decoder(latents)[..., samples], rtol=0, atol=1e-5)


def test_a_copy_on_the_host_is_in_float32_and_leaves_the_decoder_as_it_is(tiny_vae: Path) -> None:
    narrow = Codec(tiny_vae, device=torch.device("cpu"), dtype=torch.bfloat16).decoder
    host = copy_to_host(narrow)
    assert {weight.dtype for weight in host.parameters()} == {torch.float32}
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}
    for copied, weight in zip(host.parameters(), narrow.parameters(), strict=True):
        assert torch.equal(copied, weight.float())
