"""How large the models are: what a memory plan has to know of a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from soundstage_budget.tiers import LmSize
from soundstage_runtime.score import NUM_CODES

BYTES: Final[Mapping[str, int]] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """The dimensions of a stack of transformer layers."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linear_parameters(self) -> int:
        """Return how many numbers the matrices of one layer hold, with one attention in it."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.width * self.mlp_width

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Return what keys and values of so many tokens take, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class LmModel:
    """A planner; `file_bytes` is 0 for one that is known by name only."""

    variant: str
    shape: TransformerShape
    vocabulary: int
    num_codes: int
    parameters: int
    file_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DitModel:
    """A diffusion model: the parameters of its transformer, and of each of the networks beside it.

    Networks that are offloaded come to the card in pieces, none larger than `largest_piece`.
    """

    variant: str
    shape: TransformerShape
    parameters: int
    beside: tuple[int, ...]
    largest_piece: int
    is_guided: bool = False
    file_bytes: int = 0

    @property
    def layer_parameters(self) -> int:
        """Return how many numbers the matrices of one block hold, with its two attentions."""
        shape = self.shape
        return shape.linear_parameters + 2 * shape.width * (shape.heads + shape.kv_heads) * shape.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class VaeModel:
    """A codec: the parameters of its halves and of the largest layer, and how wide the wider half is.

    That is the channels at the full sample rate, and the values of a latent frame from an eighth of that rate on down.
    """

    variant: str
    encoder_parameters: int
    decoder_parameters: int
    largest_tensor: int
    channels: int
    frame_values: int
    file_bytes: int = 0


def _lm(variant: LmSize, width: int, mlp_width: int, layers: int, heads: int) -> LmModel:
    shape = TransformerShape(width=width, mlp_width=mlp_width, layers=layers, heads=heads, kv_heads=8, head_dim=128)
    vocabulary = 217_204
    parameters = vocabulary * width + layers * shape.linear_parameters
    return LmModel(variant=variant, shape=shape, vocabulary=vocabulary, num_codes=NUM_CODES, parameters=parameters)


LMS: Final[Mapping[LmSize, LmModel]] = {
    "0.6B": _lm("0.6B", 1024, 3072, 28, 16),
    "1.7B": _lm("1.7B", 2048, 6144, 28, 16),
    "4B": _lm("4B", 2560, 9728, 36, 32),
}

_TEXT_ENCODER, _CONDITIONS, _CODE_ENCODER, _CODE_DECODER = 595_776_512, 608_369_664, 105_032_198, 105_011_776


def _dit(variant: str) -> DitModel:
    is_xl = variant.startswith("xl-")
    sizes = (2560, 9728, 32, 32) if is_xl else (2048, 6144, 24, 16)
    width, mlp_width, layers, heads = sizes
    return DitModel(
        variant=variant,
        shape=TransformerShape(width=width, mlp_width=mlp_width, layers=layers, heads=heads, kv_heads=8, head_dim=128),
        parameters=4_168_897_088 if is_xl else 1_575_458_880,
        beside=(_TEXT_ENCODER, _CONDITIONS, _CODE_ENCODER, _CODE_DECODER),
        largest_piece=_CODE_ENCODER,
        is_guided="turbo" not in variant,
    )


DITS: Final[Mapping[str, DitModel]] = {
    variant: _dit(variant) for variant in ("turbo", "base", "sft", "xl-turbo", "xl-base", "xl-sft")
}

VAE: Final = VaeModel(
    variant="oobleck",
    encoder_parameters=84_281_344,
    decoder_parameters=84_414_082,
    largest_tensor=2048 * 1024 * 20,
    channels=128,
    frame_values=256 * 240,
)
