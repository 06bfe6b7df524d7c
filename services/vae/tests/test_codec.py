import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from safetensors.torch import load_file, save_file
from torch import Tensor

from soundstage_runtime.checkpoint import CheckpointError
from soundstage_vae.codec import Codec, NotFiniteError, draw_noise, fold_weight_norm

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
LATENTS = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Codec:
    return Codec(folder, device=CPU, dtype=dtype)


@pytest.fixture
def copy(tiny_vae: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_vae, tmp_path / "vae"))


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_folded_weights_decode_to_the_same_bits(codec: Codec, oracle: AutoencoderOobleck) -> None:
    few = LATENTS[:4]  # the decoder's last layers take them in one piece
    whole = oracle.decoder(torch.tensor(few.T)[None])[0].T.numpy()
    assert np.array_equal(codec.decode(few), whole)


def rename_for_newer_torch(name: str) -> str:
    parametrized = name.replace("weight_g", "parametrizations.weight.original0")
    return parametrized.replace("weight_v", "parametrizations.weight.original1")


def test_reads_weights_normed_the_newer_way(codec: Codec, copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    save_file({rename_for_newer_torch(name): tensor for name, tensor in tensors.items()}, copy / WEIGHTS)
    assert np.array_equal(load(copy).decode(LATENTS), codec.decode(LATENTS))


def test_reads_weights_already_folded(codec: Codec, copy: Path) -> None:
    save_file(fold_weight_norm(load_file(copy / WEIGHTS)), copy / WEIGHTS)
    assert np.array_equal(load(copy).decode(LATENTS), codec.decode(LATENTS))


def test_folding_leaves_each_row_with_its_gain_as_length() -> None:
    direction, gain = torch.randn(3, 4, 5), torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1)
    folded = fold_weight_norm({"conv.weight_g": gain, "conv.weight_v": direction})
    lengths = torch.linalg.vector_norm(folded["conv.weight"], dim=(1, 2))
    torch.testing.assert_close(lengths, gain.flatten())


def test_runs_in_bfloat16(tiny_vae: Path, codec: Codec) -> None:
    narrow = load(tiny_vae, torch.bfloat16).decode(LATENTS)
    assert narrow.dtype == np.float32
    # 8 bits of mantissa through some forty layers: a few hundredths on a peak of 0.6, far from another song.
    assert 0 < np.abs(narrow - codec.decode(LATENTS)).max() < 0.1


def test_last_layers_in_float32_bring_narrow_arithmetic_closer(tiny_vae: Path, codec: Codec) -> None:
    kept = Codec(tiny_vae, device=CPU, dtype=torch.bfloat16, last_layers_fp32=True)
    whole = codec.decode(LATENTS)
    narrow, wide = (
        float(np.square(one.decode(LATENTS) - whole).mean()) for one in (load(tiny_vae, torch.bfloat16), kept)
    )
    assert 0 < wide < narrow


def test_runs_in_float16(tiny_vae: Path, codec: Codec) -> None:
    assert 0 < np.abs(load(tiny_vae, torch.float16).decode(LATENTS) - codec.decode(LATENTS)).max() < 0.02


@pytest.mark.parametrize(("num_samples", "num_frames"), [(1920, 1), (1921, 1), (3839, 1), (3840, 2)])
def test_encodes_one_frame_for_every_1920_samples(codec: Codec, num_samples: int, num_frames: int) -> None:
    mean, deviation = codec.encode(np.zeros((num_samples, 2), np.float32))
    assert mean.shape == deviation.shape == (num_frames, 64)
    assert (deviation > 0).all()


def test_decodes_1920_samples_for_one_frame(codec: Codec) -> None:
    assert codec.decode(LATENTS[:1]).shape == (1920, 2)


def test_what_is_not_finite_is_one_windows_failure_alone(codec: Codec) -> None:
    fine, broken = codec.decode_batch([LATENTS, np.full_like(LATENTS, np.inf)])
    assert isinstance(fine, np.ndarray)
    assert isinstance(broken, NotFiniteError)


def test_refuses_to_give_what_is_not_finite(codec: Codec) -> None:
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        codec.decode(np.full((1, 64), np.inf, np.float32))


def test_names_a_missing_tensor(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    del tensors["decoder.conv1.weight_v"]
    save_file(tensors, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"missing decoder\.conv1\.weight; unexpected decoder\.conv1\.weight_g"):
        load(copy)


def test_names_a_missing_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling_rate": 44_100}, "sampling_rate is 44100; must be 48000"),
        (
            {"downsampling_ratios": [2, 4, 4, 8, 8]},
            r"downsampling_ratios is \[2, 4, 4, 8, 8\]; must be \[2, 4, 4, 6, 10\]",
        ),
        ({"decoder_input_channels": None}, "decoder_input_channels is None; must be 64"),
        ({"audio_channels": 1}, "audio_channels is 1; must be 2"),
    ],
)
def test_refuses_a_codec_at_other_rates(copy: Path, changes: dict[str, object], message: str) -> None:
    rewrite_config(copy, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_noise_is_what_diffusers_draws_for_a_seed(codec: Codec, oracle: AutoencoderOobleck) -> None:
    audio = np.random.default_rng(2).uniform(-0.5, 0.5, (4000, 2)).astype(np.float32)
    mean, deviation = codec.encode(audio)
    posterior = oracle.encode(torch.tensor(audio.T)[None]).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    drawn: Tensor = posterior.sample(generator=torch.Generator().manual_seed(9))
    np.testing.assert_allclose(mean + deviation * draw_noise(2, 9), drawn[0].T.numpy(), rtol=0, atol=1e-6)
