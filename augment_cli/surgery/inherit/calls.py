"""Inputs and outputs of convolutions while a model runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Calls = dict[str, list[tuple[Tensor, Tensor]]]
"""By the names of modules: input and output of each call, in order."""


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[Calls]:
    """Record every call of the named modules while the context is open.

    Inputs are copied, and the model goes on with copies of the outputs: an activation may change either in place.
    """
    calls: Calls = {name: [] for name in names}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def record(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
            calls[name].append((args[0].clone(), out))
            return out.clone()

        return record

    handles = [model.get_submodule(name).register_forward_hook(recorder(name)) for name in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
