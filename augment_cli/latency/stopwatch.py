"""Marks in time, on the CPU or in a CUDA stream, and the spans of modules between them."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function


class Stopwatch(Protocol):
    """Sets marks. The nanoseconds between two are known once everything that was started has ended."""

    def mark(self) -> Any: ...
    def finish(self) -> None:
        """Wait for everything that was started."""

    def between(self, start: Any, end: Any) -> float: ...


class CPUStopwatch:
    """The time of the CPU."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def finish(self) -> None:
        """Nothing is under way when a call on the CPU returns."""

    def between(self, start: int, end: int) -> float:
        return float(end - start)


class CUDAStopwatch:
    """Events in the current stream of a CUDA device: its time, with that in which it waits for work to be launched."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return 1e6 * start.elapsed_time(end)


def stopwatch(device: str) -> Stopwatch:
    """The stopwatch of a device, by torch's name."""
    return CPUStopwatch() if device == "cpu" else CUDAStopwatch(device)


class SiteClock:
    """Times modules of a model while it runs, forward and backward, by hooks."""

    def __init__(self, model: nn.Module, names: Sequence[str], watch: Stopwatch) -> None:
        self.watch, self.names = watch, names
        self.spans: list[tuple[str, Any, Any]] = []
        for name in names:
            begun: list[Any] = []
            module = model.get_submodule(name)
            module.register_forward_pre_hook(self._begin(name, begun))
            module.register_forward_hook(self._end(name, begun))

    def take(self) -> dict[str, float]:
        """Nanoseconds of each module since the last time, all of its calls together."""
        found: dict[str, float] = defaultdict(float)
        for name, start, end in self.spans:
            found[name] += self.watch.between(start, end)
        self.spans.clear()
        return dict(found)

    def _begin(self, name: str, begun: list[Any]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def begin(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            gradient: list[Any] = []
            x = args[0]
            if torch.is_grad_enabled() and x.requires_grad:
                x = _Mark.apply(x, lambda: self.spans.append((name, gradient[0], self.watch.mark())))
            begun[:] = [gradient, self.watch.mark()]
            return (x, *args[1:])

        return begin

    def _end(self, name: str, begun: list[Any]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def end(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            gradient, start = begun
            self.spans.append((name, start, self.watch.mark()))
            if out.requires_grad:
                out.register_hook(lambda _: gradient.append(self.watch.mark()))

        return end


class _Mark(Function):
    """The identity, which calls `note` when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[], None]) -> Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.note()
        return grads[0], None
