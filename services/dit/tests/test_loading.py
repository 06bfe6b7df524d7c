"""What is on a device while models are loaded: never more than what stays, which is what is planned."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soundstage_budget.need import Quantization, need_dit
from soundstage_cli.tiny.dit import TINY, write_original
from soundstage_dit.models import load_models
from soundstage_dit.settings import DitSettings
from soundstage_dit.size import read_size
from soundstage_runtime.settings import load_settings

# Rows as long as that are scaled by next to nothing, and silence is not most of it.
SIZE = replace(TINY, encoder={**TINY.encoder, "hidden_size": 512, "intermediate_size": 1024})
CARD = torch.device("meta")  # a device without memory, that tensors can be moved to and computed on


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive on the card, after every operation; the most is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most_bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let an operation happen, and look at what it gave."""
        given = func(*args, **(kwargs or {}))
        sources = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        # What is made of nothing, or is yet to learn, are networks without memory that weights are read into.
        if sources and not any(source.requires_grad for source in sources):
            for tensor in tree_leaves(given):
                self._note(tensor)
        self._alive = {key: (held, size) for key, (held, size) in self._alive.items() if not held.expired()}
        self.most_bytes = max(self.most_bytes, sum(size for _, size in self._alive.values()))
        return given

    def _note(self, tensor: Any) -> None:
        if hasattr(tensor, "__tensor_flatten__") and type(tensor) is not Tensor:
            for name in tensor.__tensor_flatten__()[0]:
                self._note(getattr(tensor, name))
        elif isinstance(tensor, Tensor) and tensor.device.type == CARD.type:
            storage = tensor.untyped_storage()
            held = StorageWeakRef(storage)
            self._alive[held.cdata] = (held, storage.nbytes())


@pytest.mark.parametrize("quantization", ["none", "int8", "fp8"])
def test_no_more_is_on_the_card_while_loading_than_what_stays(tmp_path: Path, quantization: Quantization) -> None:
    folder = write_original(tmp_path, size=SIZE)
    settings = load_settings(DitSettings, ["--model", str(folder), "--quantization", quantization])
    with Ledger() as ledger:
        models, _ = load_models(settings, CARD, torch.float32)
    need = need_dit(
        read_size(folder, None),
        dtype="float32",
        quantization=quantization,
        offload="none",
        max_batch=1,
        max_duration_s=10,
        max_tokens=100,
        on_card=True,
    )
    assert {parameter.device.type for part in models[0].parts for parameter in part.parameters()} == {CARD.type}
    assert 0.95 * need.weights <= ledger.most_bytes <= 1.01 * need.weights
    assert need.peak == need.total
