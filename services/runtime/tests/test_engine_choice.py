import pytest

from soundstage_budget.cards import Card
from soundstage_budget.engine_choice import AskedEngine, EngineChoice, can_compile, choose_dtype, choose_engine

CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120")
CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
ROCM = ("gfx90a", "gfx942", "gfx1100")


def choose(
    card: Card, *, arch: tuple[str, ...] = CUDA_13, version: str | None = "0.33.0", asked: AskedEngine = "auto"
) -> EngineChoice:
    return choose_engine(card, torch_arch_list=arch, vllm_version=version, asked=asked)


def cuda(major: int, minor: int, memory_gib: float) -> Card:
    return Card(capability=(major, minor), memory_gib=memory_gib)


CPU = Card()
H200 = cuda(9, 0, 139.8)
P100 = cuda(6, 0, 15.9)


@pytest.mark.parametrize(
    ("name", "card", "arch", "engine", "dtype"),
    [
        ("GTX 980 Ti", cuda(5, 2, 5.9), CUDA_126, "torch", "float32"),
        ("GTX 1080 Ti", cuda(6, 1, 10.9), CUDA_126, "torch", "float32"),
        ("TITAN Xp", cuda(6, 1, 11.9), CUDA_126, "torch", "float32"),
        ("Tesla P100", P100, CUDA_126, "torch", "float32"),
        ("Tesla V100", cuda(7, 0, 31.7), CUDA_126, "torch", "float16"),
        ("TITAN V", cuda(7, 0, 11.8), CUDA_126, "torch", "float16"),
        ("Tesla T4", cuda(7, 5, 14.6), CUDA_13, "vllm", "float16"),
        ("RTX 2080 Ti", cuda(7, 5, 10.7), CUDA_13, "vllm", "float16"),
        ("GTX 1650", cuda(7, 5, 3.8), CUDA_13, "torch", "float16"),
        ("RTX 2060", cuda(7, 5, 5.8), CUDA_13, "torch", "float16"),
        ("A100", cuda(8, 0, 79.2), CUDA_13, "vllm", "bfloat16"),
        ("RTX 3050", cuda(8, 6, 7.7), CUDA_13, "vllm", "bfloat16"),
        ("RTX 3060", cuda(8, 6, 11.6), CUDA_13, "vllm", "bfloat16"),
        ("RTX 3060 Laptop", cuda(8, 6, 5.8), CUDA_13, "torch", "bfloat16"),
        ("RTX 3090", cuda(8, 6, 23.6), CUDA_13, "vllm", "bfloat16"),
        ("Jetson Orin", cuda(8, 7, 61.4), CUDA_13, "vllm", "bfloat16"),
        ("RTX 4060", cuda(8, 9, 7.6), CUDA_13, "vllm", "bfloat16"),
        ("L4", cuda(8, 9, 22.0), CUDA_13, "vllm", "bfloat16"),
        ("RTX 4090", cuda(8, 9, 23.5), CUDA_13, "vllm", "bfloat16"),
        ("H100", cuda(9, 0, 79.1), CUDA_13, "vllm", "bfloat16"),
        ("H200", H200, CUDA_13, "vllm", "bfloat16"),
        ("B200", cuda(10, 0, 178.4), CUDA_13, "vllm", "bfloat16"),
        ("RTX 5090", cuda(12, 0, 31.4), CUDA_13, "vllm", "bfloat16"),
        ("MI300X", Card(capability=(9, 4), is_rocm=True, memory_gib=191.5), ROCM, "vllm", "bfloat16"),
        ("CPU", CPU, (), "torch", "float32"),
    ],
)
def test_every_card_gets_the_engine_that_runs_on_it(
    name: str, card: Card, arch: tuple[str, ...], engine: str, dtype: str
) -> None:
    choice = choose(card, arch=arch)
    assert (choice.engine, choice.dtype, choice.is_fallback) == (engine, dtype, False), name
    assert choice.uses_card == (card is not CPU)


@pytest.mark.parametrize("asked", ["auto", "torch", "vllm"])
def test_a_card_without_kernels_leaves_the_work_to_the_cpu(asked: AskedEngine) -> None:
    choice = choose(P100, arch=CUDA_13, asked=asked)
    assert (choice.engine, choice.dtype, choice.uses_card, choice.is_fallback) == ("torch", "float32", False, True)
    assert "no kernels for compute capability 6.0" in choice.reason


@pytest.mark.parametrize(
    ("card", "version", "why"),
    [
        (P100, "0.33.0", "needs compute capability 7.5, the card has 6.0"),
        (cuda(7, 0, 31.7), "0.33.0", "needs compute capability 7.5, the card has 7.0"),
        (cuda(8, 6, 5.8), "0.33.0", "a card of 8 GB, this one has 5.8"),
        (H200, None, "not installed"),
        (H200, "0.30.1", "0.30.1 is installed, versions 0.31 to before 0.34"),
        (H200, "0.34.0", "0.34.0 is installed"),
        (H200, "unknown", "unknown is installed"),
        (CPU, None, "not installed"),
    ],
)
def test_vllm_that_cannot_run_falls_back_and_says_why(card: Card, version: str | None, why: str) -> None:
    choice = choose(card, arch=CUDA_126, version=version, asked="vllm")
    assert (choice.engine, choice.is_fallback) == ("torch", True)
    assert why in choice.reason


@pytest.mark.parametrize("card", [CPU, H200, cuda(7, 5, 14.6), Card(capability=(10, 3), is_rocm=True, memory_gib=16.0)])
def test_what_is_asked_for_is_used_where_it_can_be(card: Card) -> None:
    for asked in ("torch", "vllm"):
        choice = choose(card, asked=asked)
        assert (choice.engine, choice.reason, choice.is_fallback) == (asked, "asked for", False)


def test_the_rule_for_old_cards_does_not_bind_rocm() -> None:
    old_number = Card(capability=(6, 0), is_rocm=True, memory_gib=16.0)
    assert choose(old_number, arch=ROCM).engine == "vllm"


def test_without_vllm_auto_is_torch_and_no_fallback() -> None:
    choice = choose(H200, version=None)
    assert (choice.engine, choice.dtype, choice.is_fallback) == ("torch", "bfloat16", False)


def test_kernels_kept_as_ptx_run_on_later_cards() -> None:
    assert choose(cuda(13, 0, 80.0), arch=CUDA_13).uses_card
    assert not choose(cuda(13, 0, 80.0), arch=CUDA_126).uses_card


@pytest.mark.parametrize(
    ("card", "dtype", "compiles"),
    [
        (CPU, "float32", False),
        (cuda(5, 2, 5.9), "float32", False),
        (cuda(6, 1, 10.9), "float32", False),
        (cuda(7, 0, 31.7), "float16", True),
        (cuda(7, 5, 14.6), "float16", True),
        (H200, "bfloat16", True),
        (Card(capability=(9, 4), memory_gib=191.9, is_rocm=True), "bfloat16", True),
    ],
)
def test_a_card_computes_in_what_it_is_good_at_and_compiles_where_it_can(
    card: Card, dtype: str, compiles: bool
) -> None:
    assert (choose_dtype(card), can_compile(card)) == (dtype, compiles)
