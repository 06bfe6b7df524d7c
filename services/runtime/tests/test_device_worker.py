"""Out of memory: an answer to a client, and a process that lives."""

import gc
import weakref

import grpc
import pytest
import torch

from soundstage_device.worker import DeviceMemoryError, DeviceWorker


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


async def test_other_errors_come_back_as_they_are() -> None:
    worker = DeviceWorker("test")
    with pytest.raises(ValueError, match="invalid literal"):
        await worker.run(int, "seven")
    assert await worker.run(int, "11", base=2) == 3
    worker.close()
