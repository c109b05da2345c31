"""Base classes of functions that have first derivatives only, and raise an error when asked for others."""

from typing import Any, NoReturn

from torch import Tensor
from torch.autograd import Function, forward_ad

from augment_cli.compat import are_functorch_transforms_active

WAY_OUT = "set backend to 'reference', which computes the same from operations with derivatives of every order"


class FirstOrder(Function):
    """An attention backend with a backward pass of its own. It has no `torch.func.vmap` and no forward mode."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> Any:
        raise RuntimeError(f"this attention backend has no rule for torch.func.vmap; {WAY_OUT}")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise RuntimeError(f"this attention backend has no forward-mode derivative; {WAY_OUT}")


class Gradients(FirstOrder):
    """A backward pass as a Function of its own, so that its derivative, a second one, raises a clear error."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        refuse_second_derivatives()


def refuse_second_derivatives(*_: Any) -> NoReturn:
    raise RuntimeError(f"this attention backend has no second derivatives; {WAY_OUT}")


def has_tangents(*tensors: Tensor) -> bool:
    """Whether forward mode, or a transform of torch.func, follows these tensors."""
    if are_functorch_transforms_active():
        return True
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
