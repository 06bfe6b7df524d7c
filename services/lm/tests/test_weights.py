import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from soundstage_cli.tiny.lm import write_lm
from soundstage_lm.engine import load_composer
from soundstage_lm.settings import LmSettings
from soundstage_lm.weights import Checkpoint, begin_fingerprint, load_checkpoint, read_config
from soundstage_runtime.checkpoint import CheckpointError, fingerprint
from soundstage_runtime.settings import load_settings
from soundstage_runtime.worker import Worker

P = ParamSpec("P")
T = TypeVar("T")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny, tmp_path / "copy")


def load(folder: Path) -> Checkpoint:
    return load_checkpoint(folder, device=torch.device("cpu"), dtype=torch.float32)


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def is_equal(one: Checkpoint, other: Checkpoint) -> bool:
    theirs = other.model.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.model.state_dict().items())


def test_loads_names_with_the_prefix(checkpoint: Checkpoint, tmp_path: Path) -> None:
    write_lm(tmp_path / "prefixed", prefixed=True)
    assert is_equal(load(tmp_path / "prefixed"), checkpoint)


def test_loads_shards(checkpoint: Checkpoint, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert is_equal(load(folder), checkpoint)


def test_takes_a_head_that_repeats_the_embedding(checkpoint: Checkpoint, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["embed_tokens.weight"].clone()}))
    assert is_equal(load(folder), checkpoint)


def test_refuses_a_head_of_its_own(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(folder)


def test_names_missing_and_unexpected_tensors(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"extra": tensors.pop("norm.weight")}))
    with pytest.raises(CheckpointError, match=r"missing norm\.weight; unexpected extra"):
        load(folder)


def test_names_a_tensor_of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"norm.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[3\]"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        ({"head_dim": None}, "head_dim"),
        ({"vocab_size": 100}, "tokenizer has 1261 tokens"),
    ],
)
def test_refuses_a_configuration_it_does_not_compute(folder: Path, values: dict[str, Any], named: str) -> None:
    reconfigure(folder, **values)
    with pytest.raises(CheckpointError, match=named):
        load(folder)


def test_reads_older_configurations(folder: Path) -> None:
    wanted = read_config(folder / "config.json")
    reconfigure(folder, rope_parameters=None, rope_theta=1_000_000, rope_scaling=None)
    assert read_config(folder / "config.json") == wanted


def test_fingerprint_is_of_the_configuration_the_tokenizer_and_the_weights(folder: Path) -> None:
    names = ("config.json", "tokenizer.json", "model.safetensors")
    seen = {fingerprint(folder / name for name in names)}
    assert begin_fingerprint(folder)() in seen
    for name in names:
        with (folder / name).open("ab") as file:
            file.write(b"\n")
        seen.add(begin_fingerprint(folder)())
    assert len(seen) == 4


class Telling(Worker):
    """Says when it has done something."""

    def __init__(self) -> None:
        super().__init__("telling")
        self.done = threading.Event()

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        result = await super().run(work, *args, **kwargs)
        self.done.set()
        return result


async def test_weights_are_read_while_the_files_are_hashed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, digest, worker = begin_fingerprint(tiny)(), hashlib.file_digest, Telling()

    def digest_once_loaded(*args: Any) -> Any:
        assert worker.done.wait(timeout=30)
        return digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", digest_once_loaded)
    loaded = await load_composer(load_settings(LmSettings, ["--model", str(tiny), "--device", "cpu"]), worker)
    loaded.close()
    assert loaded.model.model_fingerprint == loaded.composer.fingerprint == expected


def test_names_an_unknown_size_by_its_dimensions(checkpoint: Checkpoint) -> None:
    assert checkpoint.variant == "64x2"
