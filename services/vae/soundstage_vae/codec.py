"""The Oobleck VAE on its device: one tile at a time, numpy in and out."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from soundstage_device.weights import build, read_weights
from soundstage_runtime.checkpoint import CheckpointError, fingerprint, read_json, weight_files
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.score import CHANNELS, LATENT_CHANNELS, SAMPLE_RATE_HZ

# What rates, context and wire shapes rest on. Channel widths are free.
_CONFIG: Final = {
    "downsampling_ratios": [2, 4, 4, 6, 10],
    "decoder_input_channels": LATENT_CHANNELS,
    "encoder_hidden_size": 2 * LATENT_CHANNELS,
    "audio_channels": CHANNELS,
    "sampling_rate": SAMPLE_RATE_HZ,
}

# What a weight-normed layer's gain and direction are called, by torch's older and newer way of norming.
_NORMED: Final = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


class NotFiniteError(ServiceError):
    """The codec's arithmetic overflowed."""

    reason = "NOT_FINITE"


class Codec:
    """Decodes and encodes tiles. Its arithmetic gives the same bits for the same tile."""

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        """Load config.json and its safetensors from `folder`; raises CheckpointError."""
        path = folder / "config.json"
        config = _read_config(path)
        self.fingerprint = fingerprint([path, *weight_files(folder)])
        self.device, self.dtype = device, dtype
        halves = build(
            lambda: _make_halves(config),
            fold_weight_norm(read_weights(folder)),
            where=str(folder),
            device=device,
            dtype=dtype,
        )
        self._encoder, self._decoder = halves["encoder"], halves["decoder"]

    @torch.inference_mode()
    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Decode latents [frames, 64] to samples [frames * 1920, 2]; raises NotFiniteError."""
        with _exact_kernels():
            return self._to_numpy(self._decoder(self._to_device(latents)))

    @torch.inference_mode()
    def encode(self, samples: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Encode samples [n, 2] to the posterior's mean and deviation, each [n // 1920, 64]; raises NotFiniteError."""
        with _exact_kernels():
            mean, scale = self._encoder(self._to_device(samples)).float().chunk(2, dim=1)
        deviation = nn.functional.softplus(scale) + 1e-4
        return self._to_numpy(mean), self._to_numpy(deviation)

    def _to_device(self, rows: NDArray[np.float32]) -> Tensor:  # [time, channels] -> [1, channels, time]
        return torch.tensor(rows.T, dtype=self.dtype, device=self.device)[None]

    def _to_numpy(self, columns: Tensor) -> NDArray[np.float32]:  # [1, channels, time] -> [time, channels]
        rows = columns[0].T.float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise NotFiniteError(
                f"the codec gave NaN or infinity in {self.dtype}: the input is far outside the model's range, "
                "or the dtype is too narrow for this checkpoint"
            )
        return rows


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the gains of weight-normed layers into their directions; other tensors stay as they are."""
    folded = dict(tensors)
    for gain_suffix, direction_suffix in _NORMED:
        for name in tensors:
            layer = name.removesuffix(gain_suffix)
            if layer == name or layer + direction_suffix not in tensors:
                continue
            gain = folded.pop(name).float()  # [out, 1, 1]
            direction = folded.pop(layer + direction_suffix).float()  # [out, in, kernel]
            # torch's own kernel for a normed layer, so that the folded weight has the same bits.
            weight = torch._weight_norm(direction, gain, 0)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            folded[layer + ".weight"] = weight
    return folded


def draw_noise(num_frames: int, seed: int) -> NDArray[np.float32]:
    """Draw normal noise [num_frames, 64] on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, LATENT_CHANNELS, num_frames, generator=generator)[0].T.numpy()


def _make_halves(config: dict[str, Any]) -> nn.ModuleDict:
    with warnings.catch_warnings():
        # The model is weight-normed in torch's older way; it is folded before anybody could mind.
        warnings.simplefilter("ignore", FutureWarning)
        vae = cast(AutoencoderOobleck, AutoencoderOobleck.from_config(config))
    for module in vae.modules():
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)
    return nn.ModuleDict({"encoder": vae.encoder, "decoder": vae.decoder})


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    for name, wanted in _CONFIG.items():
        if config.get(name) != wanted:
            raise CheckpointError(f"{path}: {name} is {config.get(name)}; must be {wanted}")
    return config


def _exact_kernels() -> AbstractContextManager[None]:
    """CUDA only: no TF32, which costs three decimals, and no kernels that sum in a different order every time."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
