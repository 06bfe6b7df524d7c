"""Which engine plans on which card. vLLM checks nothing when it starts, so this is decided before it is imported."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from soundstage_budget.cards import Card
from soundstage_budget.tiers import tier_of

EngineName = Literal["torch", "vllm"]
AskedEngine = Literal["auto", "torch", "vllm"]
DtypeChoice = Literal["float32", "float16", "bfloat16"]

VLLM_VERSIONS: Final = ((0, 31), (0, 34))  # from the first on, before the second
_LEAST_CAPABILITY: Final = (7, 5)  # vLLM's wheels have no kernels for less
_BFLOAT16_CAPABILITY: Final = (8, 0)
_FLOAT16_CAPABILITY: Final = (7, 0)
_COMPILED_CAPABILITY: Final = (7, 0)  # Triton's kernels need it


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """The engine, its arithmetic, and why; `is_fallback` when something that was asked for cannot be had."""

    engine: EngineName
    dtype: DtypeChoice
    reason: str
    uses_card: bool
    is_fallback: bool = False


def choose_engine(
    card: Card, *, torch_arch_list: tuple[str, ...], vllm_version: str | None, asked: AskedEngine = "auto"
) -> EngineChoice:
    """Choose the engine. `vllm_version` is None where vLLM is not installed."""
    uses_card = has_kernels(card, torch_arch_list)
    dtype = choose_dtype(card) if uses_card else "float32"

    def choose(engine: EngineName, reason: str) -> EngineChoice:
        is_fallback = asked not in ("auto", engine) or (card.capability is not None and not uses_card)
        return EngineChoice(engine=engine, dtype=dtype, reason=reason, uses_card=uses_card, is_fallback=is_fallback)

    if card.capability is not None and not uses_card:
        return choose("torch", f"this build of torch has no kernels for compute capability {_name(card.capability)}")
    if asked == "torch":
        return choose("torch", "asked for")
    obstacle = _obstacle(card, vllm_version)
    if obstacle is not None:
        return choose("torch", obstacle)
    if card.capability is None and asked == "auto":
        return choose("torch", "on a CPU vLLM is only used when asked for")
    if asked == "vllm":
        return choose("vllm", "asked for")
    return choose("vllm", "a ROCm card" if card.is_rocm else f"compute capability {_name(card.capability)}")


def choose_dtype(card: Card) -> DtypeChoice:
    """Return the arithmetic that a card is good at; before Volta float16 is slow, and a CPU does best in float32."""
    if card.is_rocm or (card.capability is not None and card.capability >= _BFLOAT16_CAPABILITY):
        return "bfloat16"
    return "float16" if card.capability is not None and card.capability >= _FLOAT16_CAPABILITY else "float32"


def has_kernels(card: Card, torch_arch_list: Sequence[str]) -> bool:
    """Say whether a torch built for an arch list, as `torch.cuda.get_arch_list` gives it, has kernels for a card.

    A binary runs on its own major version from its minor version on; what was kept as PTX on all later cards. A torch
    that was built on the machine it runs on may list nothing.
    """
    if card.capability is None:
        return False
    if card.is_rocm or not torch_arch_list:
        return True
    for name in torch_arch_list:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if found is None:
            continue
        built = (int(found[2]), int(found[3]))
        if built <= card.capability and (found[1] == "compute" or built[0] == card.capability[0]):
            return True
    return False


def can_compile(card: Card) -> bool:
    """Say whether a card runs what torch's compiler makes, FlexAttention too."""
    return card.is_rocm or (card.capability is not None and card.capability >= _COMPILED_CAPABILITY)


def _obstacle(card: Card, vllm_version: str | None) -> str | None:
    """Say what keeps vLLM from running here."""
    if card.capability is not None and not card.is_rocm and card.capability < _LEAST_CAPABILITY:
        return f"vLLM needs compute capability {_name(_LEAST_CAPABILITY)}, the card has {_name(card.capability)}"
    if card.capability is not None and not tier_of(card.memory_gib).is_vllm:
        return f"vLLM wants a card of 8 GB, this one has {card.memory_gib:.1f}"
    if vllm_version is None:
        return "vLLM is not installed"
    found = re.match(r"(\d+)\.(\d+)", vllm_version)
    if found is None or not VLLM_VERSIONS[0] <= (int(found[1]), int(found[2])) < VLLM_VERSIONS[1]:
        wanted = " to before ".join(map(_name, VLLM_VERSIONS))
        return f"vLLM {vllm_version} is installed, versions {wanted} are known to work"
    return None


def _name(version: tuple[int, int] | None) -> str:
    return ".".join(map(str, version or ()))
