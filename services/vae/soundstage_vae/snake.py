"""The snake, which is between all convolutions: as plain kernels, or as one that the compiler makes for any length."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import structlog
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import Snake1d
from torch import Tensor, nn

Bend = Callable[[Tensor, Tensor, Tensor], Tensor]

# The compiler chooses its blocks by the size that it sees first, and small ones are slow. Where two lengths are equal,
# it takes it that they always are.
_TRIAL_SHAPE: Final = (2, 128, 1024)
_TOLERANCE: Final = 1e-5  # in float32; of narrower numbers, so many steps:
_TOLERANCE_STEPS: Final = 8

_log = structlog.stdlib.get_logger()


def bend(x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
    """x + sin²(frequency x) · amplitude with one new tensor; x [batch, channels, time], the others [1, channels, 1]."""
    wave = torch.mul(x, frequency).sin_().square_()
    return wave.mul_(amplitude).add_(x)


class Snake(nn.Module):
    """`bend`, or what takes its place, with a layer's frequencies and amplitudes."""

    def __init__(self, snake: Snake1d) -> None:
        """Take a loaded layer's parameters, which are logarithms."""
        super().__init__()
        self.frequency = nn.Parameter(snake.alpha.exp(), requires_grad=False)
        self.amplitude = nn.Parameter((snake.beta.exp() + 1e-9).reciprocal(), requires_grad=False)
        self.bend: Bend = bend

    def forward(self, x: Tensor) -> Tensor:
        """Bend x [batch, channels, time]."""
        return self.bend(x, self.frequency, self.amplitude)


def swap_snakes(module: nn.Module) -> None:
    """Put Snake in the place of diffusers' own, which makes five tensors, all through a loaded module."""
    for name, child in module.named_children():
        if isinstance(child, Snake1d):
            setattr(module, name, Snake(child))
        else:
            swap_snakes(child)


def put_bend(module: nn.Module, bend: Bend) -> None:
    """Have all snakes of a module bend by this function."""
    for child in module.modules():
        if isinstance(child, Snake):
            child.bend = bend


def compile_bend(
    device: torch.device, dtypes: Iterable[torch.dtype], backend: str | Callable[..., Any] = "inductor"
) -> Bend | None:
    """Return `bend` compiled into one program for each dtype, whatever the shape.

    All are made and tried here. Where that fails, or one gives what `bend` does not, a line of the log says so, and it
    is None.
    """
    compiled = _compile(backend)
    try:
        for dtype in dtypes:
            _try(compiled, device, dtype)
    except (RuntimeError, ArithmeticError, OSError) as error:
        why = " ".join(str(error).strip().splitlines()[:2])  # torch says who failed, and then why
        _log.warning("compile_failed", error=type(error).__name__, why=why)
        return None
    return compiled


def _compile(backend: str | Callable[..., Any]) -> Bend:
    compiled = torch.compile(_bend_rows, dynamic=True, fullgraph=True, backend=backend)

    def run(x: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
        if x.shape[-1] == 1:  # a program of its own, for a tile of one frame
            return bend(x, frequency, amplitude)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return compiled(rows, frequency.view(-1), amplitude.view(-1)).view_as(x)

    return run


def _bend_rows(rows: Tensor, frequency: Tensor, amplitude: Tensor) -> Tensor:
    """Bend [batch * channels, time] with two of [channels]: a batch of one would be a program of its own."""
    batch = len(rows) // len(frequency)
    return bend(rows, frequency.repeat(batch)[:, None], amplitude.repeat(batch)[:, None])


def _try(compiled: Bend, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ArithmeticError if a function does not bend as `bend` does."""
    # A layer as they are loaded: the compiler tells its weights from tensors of any other origin.
    layer = Snake1d(_TRIAL_SHAPE[1])
    layer.alpha.data = layer.beta.data = torch.linspace(-0.7, 0.7, _TRIAL_SHAPE[1]).view(1, -1, 1)
    snake = Snake(layer).to(device, dtype)
    with torch.inference_mode():
        x = torch.linspace(-8, 8, math.prod(_TRIAL_SHAPE), device=device, dtype=dtype).view(_TRIAL_SHAPE)
        found, expected = compiled(x, snake.frequency, snake.amplitude), snake(x)
        tolerance = max(_TOLERANCE, _TOLERANCE_STEPS * torch.finfo(dtype).eps)
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
            difference = float((found - expected).abs().max())
            raise ArithmeticError(f"in {dtype} the compiled snake is off by {difference:.2g}")
