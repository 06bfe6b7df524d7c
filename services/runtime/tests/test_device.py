import pytest
import torch

from soundstage_device.device import DeviceError, choose_device, choose_dtype, dtype_name


def test_auto_on_a_machine_without_cuda_is_the_cpu_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device = choose_device("auto")
    assert device == torch.device("cpu")
    assert dtype_name(choose_dtype("auto", device)) == "float32"


def test_a_device_that_is_not_there_is_refused_with_what_would_do() -> None:
    with pytest.raises(DeviceError, match=r"device is 'cuda:99', but torch .* sees \d+ CUDA devices here; auto takes"):
        choose_device("cuda:99")
