"""AW's convolution by the compiled kernel. `native/attended.h` describes the algorithm."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from augment_cli.layers.aw.backend import Sums, UsualOrder
from augment_cli.layers.native import attended


@dataclass(frozen=True)
class Native(UsualOrder):
    """One call of the compiled kernel, which takes dense tensors only."""

    name = "native"

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        with _dense(out) as place:
            attended.forward(*_inputs(x, kernel, mixing, scales), self.geometry, place)

    def gradients(
        self,
        d_out: Tensor,
        x: Tensor,
        kernel: Tensor,
        mixing: Tensor,
        scales: Tensor,
        dx: Tensor | None,
        sums: Sums | None,
    ) -> None:
        of_x, of_rest = None, None
        with ExitStack() as places:
            if dx is not None:
                of_x = places.enter_context(_dense(dx))
            if sums is not None:
                of_kernel = places.enter_context(_dense(sums.kernel)).flatten(1)
                of_mixing = places.enter_context(_dense(sums.mixing.flatten(1).t()))
                of_rest = of_kernel, of_mixing, places.enter_context(_dense(sums.scales)).squeeze(2)
            attended.backward(d_out.contiguous(), _inputs(x, kernel, mixing, scales), self.geometry, of_x, of_rest)


def _inputs(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor) -> attended.Inputs:
    """Shapes: from those that `UsualOrder.arranged` gives to those that `native.attended.forward` takes."""
    kernel, mixing, scales = kernel.flatten(1), mixing.flatten(1).t(), scales.squeeze(2)
    return x.contiguous(), kernel.contiguous(), mixing.contiguous(), scales.contiguous()


@contextmanager
def _dense(tensor: Tensor) -> Iterator[Tensor]:
    """A dense tensor to write to. If the given one is not dense, it gets a copy at the end."""
    if tensor.is_contiguous():
        yield tensor
    else:
        dense = tensor.new_empty(tensor.shape)
        yield dense
        tensor.copy_(dense)
