"""A tiny random Oobleck VAE at the released rates: 48 kHz stereo, 25 latent frames a second, 64 channels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from torch import Tensor

# Torch's default init weakens the signal at every layer. More than this, and rounding errors grow on their way through.
_DECODER_GAIN: Final = 1.5
_ENCODER_GAIN: Final = 1.2
_PEAK: Final = 0.6  # of the audio decoded from unit-normal latents


@torch.inference_mode()
def write_vae(folder: Path, *, seed: int = 0, channels: int = 8, multiples: Sequence[int] = (1, 1, 1, 1, 1)) -> None:
    """Write config.json and diffusion_pytorch_model.safetensors, weight-normed as released, into `folder`.

    The released codec has 128 `channels` and `multiples` of 1, 2, 4, 8 and 16.
    Unit-normal latents decode to audio that peaks near 0.6; that audio encodes to latents of about unit deviation.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderOobleck(
            encoder_hidden_size=128,  # the encoder ends in this many channels: mean and scale of 64 latent channels
            downsampling_ratios=[2, 4, 4, 6, 10],
            channel_multiples=list(multiples),
            decoder_channels=channels,
            decoder_input_channels=64,
            audio_channels=2,
            sampling_rate=48_000,
        )
        for name, parameter in vae.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(_DECODER_GAIN if name.startswith("decoder.") else _ENCODER_GAIN)
        latents = torch.randn(1, 64, 25)
        audio: Tensor = vae.decoder(latents)  # [1, 2, 48000]
        gain = _PEAK / audio.abs().max()
        vae.get_parameter("decoder.conv2.weight_g").mul_(gain)
        mean: Tensor = vae.encoder(audio * gain)[:, :64]  # [1, 64, 25]
        vae.get_parameter("encoder.conv2.weight_g").div_(mean.std())
    vae.save_pretrained(folder)
