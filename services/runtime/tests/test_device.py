import pytest
import torch
from structlog.testing import capture_logs

from soundstage_budget.cards import Card, find_card
from soundstage_device.device import DeviceError, choose_among, choose_device, choose_dtype, dtype_name

CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_110", "sm_120", "compute_120")
CUDA_126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
ROCM = ("gfx90a", "gfx942", "gfx1100")

PASCAL, VOLTA, TURING = find_card("GTX 1080 Ti"), find_card("V100 16GB"), find_card("T4")
AMPERE, BLACKWELL, MI300X = find_card("RTX 3060"), find_card("RTX 5090"), find_card("MI300X")


def test_auto_on_a_machine_without_cuda_is_the_cpu_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = choose_device("auto")
    assert device == torch.device("cpu")
    assert dtype_name(choose_dtype("auto", device)) == "float32"


def test_a_device_that_is_not_there_is_refused_with_what_would_do() -> None:
    with pytest.raises(DeviceError, match=r"device is 'cuda:99', but torch .* sees \d+ CUDA devices here; auto takes"):
        choose_device("cuda:99")


@pytest.mark.parametrize("needs_kernels", [True, False])
@pytest.mark.parametrize(
    ("cards", "arch", "device"),
    [
        ([], CUDA_13, "cpu"),
        ([PASCAL], CUDA_126, "cuda:0"),
        ([VOLTA], CUDA_126, "cuda:0"),
        ([TURING], CUDA_126, "cuda:0"),
        ([TURING], CUDA_13, "cuda:0"),
        ([AMPERE], CUDA_13, "cuda:0"),
        ([BLACKWELL], CUDA_13, "cuda:0"),
        ([AMPERE], (), "cuda:0"),  # a build that does not say
        ([MI300X], ROCM, "cuda:0"),
        ([PASCAL, AMPERE], CUDA_126, "cuda:0"),
        ([PASCAL, AMPERE], CUDA_13, "cuda:1"),
        ([PASCAL, VOLTA, BLACKWELL, TURING], CUDA_13, "cuda:2"),
        ([BLACKWELL, VOLTA], CUDA_126, "cuda:1"),
    ],
)
def test_auto_is_the_first_card_with_kernels(
    cards: list[Card], arch: tuple[str, ...], device: str, needs_kernels: bool
) -> None:
    with capture_logs() as logs:
        chosen = choose_among(cards, "auto", torch_arch_list=arch, needs_kernels=needs_kernels)
    assert chosen == torch.device(device)
    assert not logs


@pytest.mark.parametrize(
    ("card", "arch", "capability"), [(PASCAL, CUDA_13, "6.1"), (VOLTA, CUDA_13, "7.0"), (BLACKWELL, CUDA_126, "12.0")]
)
def test_a_card_without_kernels_is_left_by_auto_and_refused_by_name(
    card: Card, arch: tuple[str, ...], capability: str
) -> None:
    with capture_logs() as logs:
        assert choose_among([card, card], "auto", torch_arch_list=arch) == torch.device("cpu")
    [log] = logs
    assert (log["event"], log["log_level"]) == ("card_not_used", "warning")
    assert f"no kernels for {card.name}, of compute capability {capability}, only for {arch[0]}, " in log["why"]
    assert log["why"].endswith("; a build of torch that has them would do")
    with pytest.raises(DeviceError) as refused:
        choose_among([AMPERE, card], "cuda:1", torch_arch_list=arch)
    assert str(refused.value) == f"device is 'cuda:1', but {log['why']}, and so would cpu"


@pytest.mark.parametrize(("name", "device"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_rule_of_its_own_is_given_a_card_without_kernels(name: str, device: str) -> None:
    chosen = choose_among([PASCAL, PASCAL], name, torch_arch_list=CUDA_13, needs_kernels=False)
    assert chosen == torch.device(device)


def test_a_named_device_is_itself() -> None:
    cards = [TURING, AMPERE]
    for name in ("cpu", "cuda:0", "cuda:1"):
        assert choose_among(cards, name, torch_arch_list=CUDA_13) == torch.device(name)
    with pytest.raises(DeviceError, match=r"'cuda:2', but torch .* sees 2 CUDA devices here"):
        choose_among(cards, "cuda:2", torch_arch_list=CUDA_13, needs_kernels=False)
