"""The Oobleck VAE on its device: tiles of one length at a time, numpy in and out."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck, OobleckDecoder, OobleckEncoder
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import remove_weight_norm

from soundstage_budget.need import codec_piece_steps
from soundstage_device.offload import Piece, at_hand
from soundstage_device.weights import build, read_weights
from soundstage_runtime.checkpoint import CheckpointError, Fingerprints, read_json, weight_files
from soundstage_runtime.errors import ServiceError
from soundstage_runtime.score import CHANNELS, LATENT_CHANNELS, SAMPLE_RATE_HZ
from soundstage_vae.decoder import Decoder, copy_to_host
from soundstage_vae.encoder import Encoder
from soundstage_vae.memory import first_that_fits
from soundstage_vae.snake import compile_bend, put_bend
from soundstage_vae.tiling import DECODE_CONTEXT, usual_cores

_HOST: Final = torch.device("cpu")
_HOST_PIECE_STEPS: Final = codec_piece_steps(on_card=False)

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

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        last_layers_fp32: bool = False,
        is_offloaded: bool = False,
    ) -> None:
        """Load config.json and its safetensors from `folder`; raises CheckpointError.

        With `last_layers_fp32` the decoder's last blocks work in float32, whatever `dtype` is. Halves that are
        offloaded wait on the host, and come to the device for a tile.
        """
        path = folder / "config.json"
        config = _read_config(path)
        hashed = Fingerprints().begin([path, *weight_files(folder)])
        self.device, self.dtype = device, dtype
        halves = build(
            lambda: _make_halves(config),
            fold_weight_norm(read_weights(folder)),
            where=str(folder),
            device=_HOST if is_offloaded else device,
            dtype=dtype,
        )
        self.fingerprint = hashed()
        self.encoder = Encoder(cast(OobleckEncoder, halves["encoder"]))
        self.decoder = Decoder(cast(OobleckDecoder, halves["decoder"]))
        if last_layers_fp32:
            self.decoder.tail.float()
        offloaded: Sequence[nn.Module] = (self.encoder, self.decoder) if is_offloaded else ()
        self._pieces = {half: Piece(half.modules(), device) for half in offloaded}
        self._host: Decoder | None = None
        self._piece_steps = codec_piece_steps(on_card=device.type != "cpu")

    def compile_snakes(self, backend: str | Callable[..., Any] = "inductor") -> bool:
        """Have the snakes run by one compiled function from now on; returns whether the compiler could make it."""
        halves = nn.ModuleList([self.encoder, self.decoder])
        compiled = compile_bend(self.device, {weight.dtype for weight in halves.parameters()}, backend)
        if compiled is None:
            return False
        put_bend(halves, compiled)
        return True

    def decode(self, latents: NDArray[np.float32], core: range | None = None) -> NDArray[np.float32]:
        """Decode latents [frames, 64] to samples [frames * 1920, 2]; raises NotFiniteError, DeviceMemoryError.

        With a core, those of its frames alone; the others are heard in them.
        """
        [samples] = self.decode_batch([latents], core)
        if isinstance(samples, NotFiniteError):
            raise samples
        return samples

    @torch.inference_mode()
    def decode_batch(
        self, windows: Sequence[NDArray[np.float32]], core: range | None = None
    ) -> list[NDArray[np.float32] | NotFiniteError]:
        """Decode windows of one length and core at once; each gives its samples, or its own failure."""
        with _exact_kernels():
            decoded = self._decode(np.stack(windows), core or range(len(windows[0])))
        return [samples if np.isfinite(samples).all() else self._not_finite() for samples in decoded]

    @torch.inference_mode()
    def encode(self, samples: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Encode samples [n, 2] to the posterior's mean and deviation, each [n // 1920, 64].

        Raises NotFiniteError and DeviceMemoryError.
        """
        with _exact_kernels():
            posterior = first_that_fits(
                [
                    ("on the device", partial(self._encode, samples, self._piece_steps)),
                    ("again", partial(self._encode, samples, self._piece_steps)),
                    ("in smaller pieces", partial(self._encode, samples, _HOST_PIECE_STEPS)),
                ],
                relieve=_relieve,
                what=f"an encoding of {len(samples)} samples",
            )
        if not all(np.isfinite(part).all() for part in posterior):
            raise self._not_finite()
        return posterior

    @torch.inference_mode()
    def is_batching_exact(self, window_frames: int, batch: int) -> bool:
        """Say whether windows in a batch get the bits that they get alone, by decoding some noise both ways."""
        windows = np.stack([draw_noise(window_frames, seed) for seed in range(batch)])
        with _exact_kernels():
            return all(
                np.array_equal(together, self._decode(alone[None], core)[0])
                for core in usual_cores(window_frames, DECODE_CONTEXT)
                for together, alone in zip(self._decode(windows, core), windows, strict=True)
            )

    def free_bytes(self) -> int:
        """Say how much of a CUDA device's memory is free."""
        return torch.cuda.mem_get_info(self.device)[0]

    def _encode(
        self, samples: NDArray[np.float32], piece_steps: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with at_hand(self._pieces.get(self.encoder)):
            encoded: Tensor = self.encoder(self._to_device(np.stack([samples])), piece_steps=piece_steps)
        mean, scale = encoded.float().chunk(2, dim=1)
        return _to_numpy(mean)[0], _to_numpy(nn.functional.softplus(scale) + 1e-4)[0]

    def _decode(self, latents: NDArray[np.float32], core: range) -> NDArray[np.float32]:  # [batch, frames, 64]
        batch, frames, _ = latents.shape
        attempts = [("on the device", lambda: self._forward(latents, core, self._piece_steps))]
        if batch > 1:
            attempts.append(("one by one", lambda: np.concatenate([self._decode(one[None], core) for one in latents])))
        else:
            attempts += [
                ("again", attempts[0][1]),
                ("in smaller pieces", lambda: self._forward(latents, core, _HOST_PIECE_STEPS, sink=_HOST)),
                ("on the host", lambda: self._forward_on_host(latents, core)),
            ]
        return first_that_fits(attempts, relieve=_relieve, what=f"a batch of {batch} tiles of {frames} latent frames")

    def _forward(
        self, latents: NDArray[np.float32], core: range, piece_steps: int, *, sink: torch.device | None = None
    ) -> NDArray[np.float32]:
        with at_hand(self._pieces.get(self.decoder)):
            return _to_numpy(self.decoder(self._to_device(latents), core=core, piece_steps=piece_steps, sink=sink))

    def _forward_on_host(self, latents: NDArray[np.float32], core: range) -> NDArray[np.float32]:
        self._host = self._host or copy_to_host(self.decoder)
        return _to_numpy(self._host(torch.from_numpy(latents).mT, core=core, piece_steps=_HOST_PIECE_STEPS))

    def _to_device(self, rows: NDArray[np.float32]) -> Tensor:  # [batch, time, channels] -> [batch, channels, time]
        return torch.from_numpy(rows).to(self.device, self.dtype).mT.contiguous()

    def _not_finite(self) -> NotFiniteError:
        return NotFiniteError(
            f"the codec gave NaN or infinity in {self.dtype}: the input is far outside the model's range, "
            "or the dtype is too narrow for this checkpoint"
        )


def _to_numpy(columns: Tensor) -> NDArray[np.float32]:  # [batch, channels, time] -> [batch, time, channels]
    return columns.mT.float().cpu().numpy()


def _relieve() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
