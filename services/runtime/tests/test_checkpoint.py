import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from soundstage_device.weights import build, read_weights
from soundstage_runtime.checkpoint import (
    CheckpointError,
    Fingerprints,
    check_names,
    fingerprint,
    locate,
    read_json,
    weight_files,
)

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}
CPU = torch.device("cpu")


def write_shards(folder: Path) -> None:
    save_file({"weight": WEIGHTS["weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"bias": WEIGHTS["bias"]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_directory_is_where_it_is(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["/no/such/place", "./nowhere", "nowhere", "", "a b/c"])
def test_what_is_neither_a_directory_nor_a_hub_id_says_what_is_wanted(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory; give a directory or a hub id owner/name"):
        locate(model)


def test_a_folder_of_a_fetched_repository_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "c0ffee"
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "vae" / "config.json").write_text("{}")
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (locate("owner/name/vae") / "config.json").is_file()


def test_one_file_of_weights_is_found_whatever_its_name(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "diffusion_pytorch_model.safetensors")
    assert [path.name for path in weight_files(tmp_path)] == ["diffusion_pytorch_model.safetensors"]


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    write_shards(tmp_path)
    tensors = read_weights(tmp_path)
    assert tensors.keys() == WEIGHTS.keys()
    assert all(torch.equal(tensors[name], WEIGHTS[name]) for name in WEIGHTS)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards that are missing: model-00002-of-00002\.safetensors"):
        weight_files(tmp_path)


def test_an_empty_folder_and_two_files_without_an_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds 0 safetensors files and no index; one is wanted"):
        weight_files(tmp_path)
    for name in ("a", "b"):
        save_file(WEIGHTS, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 safetensors files"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is missing"), ("{", "is not JSON"), ("[1]", "must hold a JSON object")]
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        read_json(path)


def test_any_byte_and_the_order_change_the_fingerprint(tmp_path: Path) -> None:
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_bytes(b'{"a": 1}')
    weights.write_bytes(bytes(1000))
    seen = {fingerprint([config, weights]), fingerprint([weights, config])}
    for place in (0, 499, 999):
        changed = bytearray(1000)
        changed[place] = 1
        weights.write_bytes(bytes(changed))
        seen.add(fingerprint([config, weights]))
    weights.write_bytes(bytes(1001))
    seen.add(fingerprint([config, weights]))
    assert len(seen) == 6
    assert all(len(one) == 64 for one in seen)


def test_a_file_is_hashed_once_for_all_that_it_is_a_part_of(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.write_text("shared")
    own.write_text("own")
    expected = [fingerprint([shared]), fingerprint([own, shared])]
    fingerprints = Fingerprints()
    found = [fingerprints.begin([shared])()]
    shared.write_text("read again")
    found.append(fingerprints.begin([own, shared])())
    assert found == expected


def test_a_file_that_cannot_be_hashed_is_told_to_whoever_waits(tmp_path: Path) -> None:
    wait = Fingerprints().begin([tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="none"):
        wait()


def test_a_byte_moved_to_the_next_file_changes_the_fingerprint(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    seen: set[str] = set()
    for cut in range(4):
        first.write_bytes(b"abc"[:cut])
        second.write_bytes(b"abc"[cut:])
        seen.add(fingerprint([first, second]))
    assert len(seen) == 4


def test_names_missing_and_unexpected_are_told_and_long_lists_cut() -> None:
    check_names(["a", "b"], ["b", "a"], where="here")
    with pytest.raises(CheckpointError, match=r"here: missing c; unexpected none"):
        check_names(["a"], ["a", "c"], where="here")
    with pytest.raises(CheckpointError, match=r"unexpected x0, x1, x2, x3, x4 and 2 more"):
        check_names([f"x{n}" for n in range(7)], [], where="here")


def test_a_module_is_built_with_exactly_its_weights() -> None:
    module = build(lambda: nn.Linear(3, 2), WEIGHTS, where="here", device=CPU, dtype=torch.float64)
    assert torch.equal(module.weight, WEIGHTS["weight"].double())
    assert module.weight.dtype == torch.float64
    assert not module.training
    assert not module.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": torch.ones(1)}, "here: missing none; unexpected extra"),
        ({"bias": torch.ones(3)}, r"here: bias has shape \[3\]; the configuration wants \[2\]"),
    ],
)
def test_a_module_is_not_built_with_other_weights(changes: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build(lambda: nn.Linear(3, 2), WEIGHTS | changes, where="here", device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("kept_bytes", [0, 4, 60, -1])
def test_a_file_of_weights_that_is_cut_short_is_named(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .* Fetch it again"):
        read_weights(tmp_path)


def test_a_configuration_that_makes_no_model_is_an_error_of_the_checkpoint() -> None:
    with pytest.raises(CheckpointError, match="here: the configuration makes no model"):
        build(lambda: nn.Linear(-3, 2), WEIGHTS, where="here", device=CPU, dtype=torch.float32)
