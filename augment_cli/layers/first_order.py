"""Functions whose first derivatives are all that there is, and which say so."""

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

WAY_OUT = "use augment_cli.layers.attention.relative_attention, which computes the same from differentiable operations"


class FirstOrder(Function):
    """A way of attention with a backward pass of its own: no `torch.func.vmap` and no forward mode."""

    @staticmethod
    def vmap(info, in_dims, *inputs):
        raise RuntimeError(f"this way of attention has no rule for torch.func.vmap; {WAY_OUT}")

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"this way of attention has no forward-mode derivative; {WAY_OUT}")


class Gradients(FirstOrder):
    """A backward pass as a Function of its own, so that asking for second derivatives gets a clear answer."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivatives()


def refuse_second_derivatives(*_) -> None:
    raise RuntimeError(f"this way of attention has no second derivatives; {WAY_OUT}")


def has_tangents(*tensors: Tensor) -> bool:
    """Whether forward mode, or a transform of torch.func, looks on."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
