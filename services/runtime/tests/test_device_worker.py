"""Out of memory: an answer to a client, and a process that lives."""

import gc
import weakref

import grpc
import pytest
import torch

from soundstage_device.worker import DeviceMemoryError, DeviceWorker, LoadMemoryError, loading
from soundstage_runtime.errors import StartError


class Greedy:
    """Work that runs out of memory as often as it is told to."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, count: int) -> int:
        held = torch.zeros(count)
        self.tensors.append(weakref.ref(held))
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nAnd much more")
        return int(held.numel())


async def test_running_out_of_memory_is_a_refusal_and_the_worker_lives() -> None:
    worker, work = DeviceWorker("test"), Greedy(failures=1)
    with pytest.raises(DeviceMemoryError, match="no memory left for this just now; a shorter song or fewer") as caught:
        await worker.run(work, 1000)
    assert (caught.value.code, caught.value.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 1.0)
    assert caught.value.__cause__ is caught.value.__context__ is None
    gc.collect()
    assert work.tensors[0]() is None
    assert await worker.run(work, 1000) == 1000
    worker.close()


def fail_by(error: Exception) -> None:
    raise error


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: f"{type(error).__name__} {error}"[:50])
async def test_no_memory_is_told_by_many_and_answered_alike(error: Exception) -> None:
    worker = DeviceWorker("test")
    with pytest.raises(DeviceMemoryError):
        await worker.run(fail_by, error)
    words = "not enough memory to load and begin: a larger card would do"
    with pytest.raises(LoadMemoryError, match=words), loading("a larger card would do"):
        raise error
    worker.close()


async def test_no_memory_at_the_start_ends_it_with_what_would_do() -> None:
    worker = DeviceWorker("test")
    with pytest.raises(StartError, match="more gpu_memory would do"), loading("more gpu_memory would do"):
        await worker.run(fail_by, MemoryError())
    with pytest.raises(ValueError, match="invalid literal"), loading("nothing"):
        await worker.run(int, "seven")
    worker.close()


@pytest.mark.parametrize("error", [RuntimeError("the device is on fire"), KeyError("can't allocate memory")])
async def test_what_only_looks_like_it_is_not_taken_for_it(error: Exception) -> None:
    worker = DeviceWorker("test")
    with pytest.raises(type(error)):
        await worker.run(fail_by, error)
    worker.close()


async def test_other_errors_come_back_as_they_are() -> None:
    worker = DeviceWorker("test")
    with pytest.raises(ValueError, match="invalid literal"):
        await worker.run(int, "seven")
    assert await worker.run(int, "11", base=2) == 3
    worker.close()
