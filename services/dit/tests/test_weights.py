"""Checkpoints in both layouts, whole, broken and foreign."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from soundstage_dit.song import Lego, Song
from soundstage_dit.weights import LoadedModel, load, text_encoder_beside
from soundstage_runtime.checkpoint import CheckpointError

CPU = torch.device("cpu")


def load_cpu(folder: Path, text_encoder: Path | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load on the CPU."""
    return load(folder, text_encoder=text_encoder, device=CPU, dtype=dtype)


@pytest.fixture
def copied(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the original layout that a test may break."""
    shutil.copytree(checkpoints / "original", tmp_path / "original")
    return tmp_path / "original" / "acestep-v15-turbo"


def change(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the tensors of a safetensors file."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def change_config(folder: Path, **fields: object) -> None:
    """Set fields of a config.json; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_a_checkpoint_for_stems_is_known_by_its_configuration(checkpoints: Path, copied: Path) -> None:
    change_config(copied, is_turbo=False, model_version="sft", is_lego_sft=True)
    model, other = load_cpu(copied), load_cpu(checkpoints / "original/acestep-v15-turbo")
    assert model.variant == "sft-stems"
    song = Song(caption="drums", lyrics="", num_frames=1, seed=0, task=Lego(mix="a rock song"))
    with torch.inference_mode():
        longer, shorter = (len(one.conditioner.encode(song)) for one in (model, other))
    assert longer - shorter == len("Global: a rock song\nLocal: \nMask Control: true")


@pytest.mark.parametrize(
    ("original", "pipeline", "variant"),
    [
        ("acestep-v15-turbo", "pipeline", "turbo"),
        ("acestep-v15-xl-turbo", "pipeline-xl", "xl-turbo"),
        ("acestep-v15-base", "pipeline-base", "base"),
    ],
)
def test_both_layouts_hold_the_same_networks(checkpoints: Path, original: str, pipeline: str, variant: str) -> None:
    one, other = load_cpu(checkpoints / "original" / original), load_cpu(checkpoints / pipeline)
    assert one.variant == other.variant == variant
    for name, tensor in one.dit.state_dict().items():
        assert torch.equal(tensor, other.dit.state_dict()[name]), name
    for name, tensor in one.code_encoder.state_dict().items():
        assert torch.equal(tensor, other.code_encoder.state_dict()[name]), name
    assert torch.equal(one.silence, other.silence)
    assert torch.equal(one.null_condition, other.null_condition)
    assert one.null_condition.shape == (1, 64)
    assert one.model_fingerprint != other.model_fingerprint


def test_weights_are_cast_to_the_wanted_dtype(checkpoints: Path) -> None:
    model = load_cpu(checkpoints / "original/acestep-v15-turbo", dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.dit.parameters()} == {torch.bfloat16}


def test_the_fingerprint_follows_every_file(copied: Path) -> None:
    seen = {load_cpu(copied).model_fingerprint}
    assert load_cpu(copied).model_fingerprint in seen
    change(copied / "model.safetensors", lambda tensors: tensors["decoder.norm_out.weight"].add_(1))
    seen.add(load_cpu(copied).model_fingerprint)
    change(
        copied.parent / "Qwen3-Embedding-0.6B/model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1)
    )
    seen.add(load_cpu(copied).model_fingerprint)
    change_config(copied, rms_norm_eps=1e-5)
    seen.add(load_cpu(copied).model_fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.layers.1.mlp.up_proj.weight", None, "decoder: missing layers.1.mlp.up_proj.weight"),
        ("encoder.text_projector.weight", None, "condition encoder: missing text_projector.weight"),
        ("detokenizer.proj_out.bias", None, "detokenizer: missing detokenizer.proj_out.bias"),
        ("tokenizer.quantizer.project_out.bias", None, "detokenizer: missing project_out.bias"),
        ("tokenizer.quantizer.project_in.bias", None, "tokenizer: missing project_in.bias"),
        (
            "tokenizer.attention_pooler.layers.1.self_attn.q_proj.weight",
            None,
            "tokenizer: missing attention_pooler.layers.1.self_attn.to_q.weight",
        ),
        ("tokenizer.quantizer.more", 1, "tokenizer: missing none; unexpected more"),
        ("decoder.more", 1, "decoder: missing none; unexpected more"),
        ("else.where", 1, "unexpected tensors else"),
        ("decoder.norm_out.weight", 3, r"norm_out.weight has shape \[3\]; the configuration wants \[64\]"),
        ("null_condition_emb", None, r"null_condition_emb is missing; \[1, 1, 64\] is wanted"),
        ("null_condition_emb", 3, r"null_condition_emb is \[3\]; \[1, 1, 64\] is wanted"),
    ],
)
def test_wrong_tensors_are_named_with_their_folder(copied: Path, name: str, shape: int | None, message: str) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = torch.zeros(shape)

    change(copied / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_cpu(copied)
    assert str(copied) in str(caught.value)


def test_a_missing_shard_is_named(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "original", tmp_path / "original")
    folder = tmp_path / "original/acestep-v15-xl-turbo"
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load_cpu(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "config.json: the configuration lacks a usable 'hidden_size'"),
        ({"fsq_input_num_quantizers": 2}, "a usable 'fsq_input_num_quantizers': it is 2; 1 is wanted"),
        ({"pool_window_size": 4}, "a usable 'pool_window_size': it is 4; 5 is wanted"),
        ({"layer_types": ["full_attention"]}, "'layer_types': 4 layers, 1 types"),
    ],
)
def test_an_unfit_configuration_is_refused(copied: Path, fields: dict[str, object], message: str) -> None:
    change_config(copied, **fields)
    with pytest.raises(CheckpointError, match=message):
        load_cpu(copied)


@pytest.mark.parametrize(
    ("fields", "variant"),
    [
        ({"is_turbo": True, "model_version": None}, "turbo"),
        ({"is_turbo": None, "model_version": "turbo-rl"}, "turbo"),
        ({"is_turbo": False, "model_version": "sft"}, "sft"),
        ({"is_turbo": False, "model_version": "base-sft-fix-inst"}, "sft"),
        ({"is_turbo": False, "model_version": "base"}, "base"),
        ({"is_turbo": None, "model_version": None}, "base"),
    ],
)
def test_a_variant_is_known_by_its_configuration(copied: Path, fields: dict[str, object], variant: str) -> None:
    change_config(copied, **fields)
    assert load_cpu(copied).variant == variant


def test_heads_that_follow_the_singing_are_the_checkpoints_own_if_it_names_some(copied: Path) -> None:
    change_config(copied, lyric_alignment_heads={"1": [3, 0]})
    assert load_cpu(copied).lyric_heads == {1: (3, 0)}
    change_config(copied, lyric_alignment_heads=None)
    assert load_cpu(copied).lyric_heads is None
    change_config(copied, lyric_alignment_heads={"1": [4]})
    with pytest.raises(CheckpointError, match="lyric_alignment_heads': there are 4 layers of 4 heads"):
        load_cpu(copied)


def test_silence_of_another_length_is_refused(copied: Path) -> None:
    torch.save(torch.zeros(1, 64, 10), copied / "silence_latent.pt")
    with pytest.raises(CheckpointError, match=r"silence_latent is \[10, 64\]; \[15000, 64\] is wanted"):
        load_cpu(copied)


class Payload:
    """What an unsafe pickle would run."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (print, ("ran",))


def test_a_silence_file_with_code_in_it_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Payload(), copied / "silence_latent.pt")
    with pytest.raises(CheckpointError, match=r"silence_latent\.pt is not a tensor file"):
        load_cpu(copied)
    assert "ran" not in capsys.readouterr().out


def test_an_empty_folder_is_refused_with_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json .* nor model_index\.json"):
        load_cpu(tmp_path)


def test_the_text_encoder_may_live_elsewhere(copied: Path, tmp_path: Path) -> None:
    beside, elsewhere = copied.parent / "Qwen3-Embedding-0.6B", tmp_path / "elsewhere"
    expected = load_cpu(copied).model_fingerprint
    beside.rename(elsewhere)
    with pytest.raises(CheckpointError, match=r"name a directory or hub id as text_encoder: ACE-Step/"):
        load_cpu(copied)
    assert load_cpu(copied, text_encoder=elsewhere).model_fingerprint == expected


def test_a_text_encoder_that_lacks_a_tensor_is_refused(copied: Path) -> None:
    change(copied.parent / "Qwen3-Embedding-0.6B/model.safetensors", lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"Qwen3-Embedding-0\.6B: missing norm\.weight"):
        load_cpu(copied)


def test_a_tokenizer_with_an_unknown_control_token_is_refused(copied: Path) -> None:
    file = copied.parent / "Qwen3-Embedding-0.6B/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": 999, "content": "[SECRET]"})
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"the added token '\[SECRET\]'"):
        load_cpu(copied)


@pytest.mark.parametrize(
    ("model", "beside"),
    [
        ("ACE-Step/Ace-Step1.5/acestep-v15-turbo", "ACE-Step/Ace-Step1.5/Qwen3-Embedding-0.6B"),
        ("ACE-Step/acestep-v15-base", ""),
        ("/models/original/acestep-v15-turbo", ""),
    ],
)
def test_the_text_encoder_of_a_hub_folder_is_the_one_beside_it(model: str, beside: str) -> None:
    assert text_encoder_beside(model) == beside


def test_the_text_encoder_of_a_relative_directory_is_found_by_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert text_encoder_beside("a/b/c") == ""
