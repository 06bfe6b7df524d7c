"""The planner's network in vLLM: Qwen3 with the released names, and a residual stream that float16 can hold."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

# What writes to the residual stream. Of the MLP it is what goes into its last product, which overflows too.
_WRITERS: Final = ("embed_tokens.weight", "o_proj.weight", "up_proj.weight")
_TIED: Final = "lm_head.weight"  # written by some tools beside the embedding that it is
_SHRINK: Final = 128  # the released planners reach 2.1e6


class Planner(Qwen3ForCausalLM):
    """Qwen3. In float16 the whole residual stream is 128 times smaller, which the norms on it do not see."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._shrink = _SHRINK if vllm_config.model_config.dtype is torch.float16 else 1
        layers: Any = self.model.layers
        norms: list[Any] = [self.model.norm]
        for layer in layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
        for norm in norms:
            norm.variance_epsilon /= self._shrink**2
        self.logits_processor.scale *= self._shrink  # the head is the embedding, shrunk as well

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors named with or without `model.`."""
        return super().load_weights(self._fit(name, tensor) for name, tensor in weights if name != _TIED)

    def _fit(self, name: str, tensor: Tensor) -> tuple[str, Tensor]:
        name = f"model.{name.removeprefix('model.')}"
        return name, tensor / self._shrink if self._shrink > 1 and name.endswith(_WRITERS) else tensor
