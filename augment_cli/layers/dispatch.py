"""Register the layers' operators with torch: compilers keep them whole, and torch.utils.flop_counter counts them.

A FLOP formula counts two FLOPs for each multiply-add of the plain operations that the operator replaces, whatever the
backend computes. So a count of the forward pass equals the plan's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("augment_cli", "FRAGMENT")


def operator(
    schema: str, run: Callable, result: Callable, flops: Callable[..., int], key: str = "CompositeExplicitAutograd"
) -> Callable[..., Any]:
    """Define an operator, and return it.

    Args:
        schema: name, arguments and results, in torch's notation. When the arguments change, the name must change:
            Inductor's cache on disk knows an operator by its name alone.
        run: computes the operator, for the dispatcher's `key`.
        result: makes empty tensors like the results; it is also called with tensors that have no data.
        flops: FLOPs of a call. It gets the arguments with a shape in place of each tensor, and `out_shape`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"augment_cli::{name}", result, lib=LIBRARY)
    packet = getattr(torch.ops.augment_cli, name)
    register_flop_formula(packet)(flops)
    return packet.default


def differentiate(name: str, backward: Callable, save: Callable | None = None) -> None:
    """Give an operator its derivative; arguments as for `torch.library.register_autograd`."""
    torch.library.register_autograd(f"augment_cli::{name}", backward, setup_context=save, lib=LIBRARY)
