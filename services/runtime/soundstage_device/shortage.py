"""Out of memory, whoever says so: torch, the libraries below it, or the host."""

from typing import Final

import torch

_WORDS: Final = (
    "can't allocate memory",  # torch, of the host
    "CUDA error: out of memory",  # the driver, through torch.AcceleratorError
    "HIP error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is a device's or the host's that has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
