"""A limit on the size of a model while it is constructed: a plan's arguments can ask for a million layers."""

import math
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules import module as registration

from augment_cli.errors import InputError


@dataclass(frozen=True)
class Limit:
    """The most parts (modules, parameters and buffers) and elements of tensors that a constructor may register."""

    parts: int = 20_000
    elements: int = 2**40

    @classmethod
    def of(cls, shapes: Collection[tuple[int, ...]]) -> "Limit":
        """The limit for a model whose tensors have these shapes.

        Constructors also register modules without tensors, and tensors that they replace later: over all models of
        timm 1.0.31 at most 4.3 parts for each tensor that stays, and 2.8 elements for each element. AA replaces a
        convolution's kernel by tensors that may be several times smaller.
        """
        return cls(parts=20 * len(shapes) + 1000, elements=16 * sum(map(math.prod, shapes)) + 2**24)


@contextmanager
def limited(model: str, limit: Limit = Limit()) -> Iterator[None]:
    """Within the block, stop this thread's constructors once they register more than the limit.

    Args:
        model: name of the model, for the message.

    Raises:
        AugmentError: the limit is exceeded.
    """
    thread, parts, elements = threading.get_ident(), 0, 0

    def count(_: nn.Module, name: str, value: nn.Module | Tensor | None) -> None:
        nonlocal parts, elements
        if threading.get_ident() != thread:
            return
        parts += 1
        if isinstance(value, Tensor):
            elements += value.numel()
        if parts > limit.parts:
            raise InputError(f"{model} would have more than {limit.parts:,} modules and tensors by its arguments")
        if elements > limit.elements:
            raise InputError(f"{model} would have tensors of more than {limit.elements:,} numbers by its arguments")

    handles = [
        registration.register_module_module_registration_hook(count),
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
