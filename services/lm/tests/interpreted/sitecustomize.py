"""On the path of a Python, this lets vLLM run its newer model runner on a CPU, with Triton's kernels interpreted.

vLLM asks Triton for a CPU backend first, which the Triton that can be installed here does not have and, with
TRITON_INTERPRET=1, does not need.
"""

from typing import Any

import triton.backends


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Interpreted:
    driver = _Driver
    compiler = None


_backends: dict[str, Any] = triton.backends.backends
_backends.setdefault("cpu", _Interpreted)
