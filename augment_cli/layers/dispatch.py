"""The layers' operators in torch's dispatcher: compilers keep them whole, and torch.utils.flop_counter counts them.

A formula counts the multiply-adds of the plain operations that an operator stands for, in a forward pass as the plan
does (`augment_cli.planning.cost`), and not those of the way in which it is computed. FLOPs are twice as many.
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("augment_cli", "FRAGMENT")


def operator(
    schema: str, run: Callable, result: Callable, flops: Callable[..., int], key: str = "CompositeExplicitAutograd"
) -> Callable:
    """Define an operator.

    Args:
        schema: its name, arguments and results, as torch writes them. Other arguments want another name: Inductor's
            cache on disk knows an operator by its name alone.
        run: computes it, for the dispatcher's `key`.
        result: makes empty tensors like its results, from tensors without data.
        flops: FLOPs, from the arguments with shapes in the place of tensors, and `out_shape`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"augment_cli::{name}", result, lib=LIBRARY)
    packet = getattr(torch.ops.augment_cli, name)
    register_flop_formula(packet)(flops)
    return packet.default


def differentiate(name: str, backward: Callable, save: Callable | None = None) -> None:
    """Give an operator its derivative, as torch.library.register_autograd does."""
    torch.library.register_autograd(f"augment_cli::{name}", backward, setup_context=save, lib=LIBRARY)
