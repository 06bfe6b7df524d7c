"""Weights that wait in the CPU's memory and come to the device in pieces, each for as long as it is used."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Piece:
    """The weights of some modules, which travel together; by a `stream` they come while the device does other work.

    They begin where they are, in the CPU's memory.
    """

    def __init__(
        self, owners: Iterable[nn.Module], device: torch.device, stream: "torch.cuda.Stream | None" = None
    ) -> None:
        self._device, self._stream = device, stream
        self._arrival: Any = None
        found = [(owner, name, tensor) for owner in owners for name, tensor in _own_tensors(owner)]
        if stream is not None:  # only what the kernel cannot page out comes beside other work
            found = [(owner, name, _map(tensor, Tensor.pin_memory)) for owner, name, tensor in found]
        self._homes = found

    def take(self) -> None:
        """Begin to bring it to the device."""
        if self._stream is not None:
            # Not before what took this place last has been used.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.inference_mode(False), torch.cuda.stream(self._stream):  # pyright: ignore[reportArgumentType]
                for owner, name, home in self._homes:
                    setattr(owner, name, _map(home, self._copy))
        except BaseException:
            self.send()
            raise
        if self._stream is not None:
            self._arrival = self._stream.record_event()

    def arrive(self) -> None:
        """Have later work wait until it is there."""
        if self._arrival is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrival)

    def send(self) -> None:
        """Let it go from the device, where it may be or not."""
        for owner, name, home in self._homes:
            setattr(owner, name, home)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=self._stream is not None, copy=True)


def relay(modules: Iterable[M], pieces: Mapping[nn.Module, Piece]) -> Iterator[M]:
    """Yield modules, each on the device until the next is asked for; that one is on its way then, and no third."""
    left = iter(modules)
    here: deque[M] = deque()
    try:
        while True:
            while len(here) < 2 and (module := next(left, None)) is not None:
                pieces[module].take()
                here.append(module)
            if not here:
                return
            pieces[here[0]].arrive()
            yield here[0]
            pieces[here.popleft()].send()
    finally:
        for module in here:
            pieces[module].send()


@contextmanager
def at_hand(piece: Piece | None) -> Generator[None]:
    """Have a piece on the device until a block ends; what is no piece is there anyway."""
    if piece is None:
        yield
        return
    piece.take()
    try:
        piece.arrive()
        yield
    finally:
        piece.send()


def come_when_called(module: nn.Module, piece: Piece) -> None:
    """Have a piece come to the device for each call of a module, and leave when that has answered or failed."""

    def take(*_: object) -> None:
        piece.take()

    def send(*_: object) -> None:
        piece.send()

    module.register_forward_pre_hook(take)
    module.register_forward_hook(send, always_call=True)


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _map(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor changed, a parameter as a parameter, a quantised one in its parts."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(_map(tensor.data, change), requires_grad=False)
    if type(tensor) is Tensor:
        return change(tensor)
    kind: Any = type(tensor)
    names, context = kind.__tensor_flatten__(tensor)
    parts = {name: _map(getattr(tensor, name), change) for name in names}
    return kind.__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
