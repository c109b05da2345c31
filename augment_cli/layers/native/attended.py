"""Call the compiled convolution of AW, `attended_forward.cpp` and `attended_backward.cpp`."""

import ctypes
import math

import torch
from torch import Tensor

from augment_cli.layers import native
from augment_cli.layers.geometry import Geometry
from augment_cli.layers.native import Argument, Kernel, fields

MOST_TAPS = 49
"""Largest number of taps of a kernel, h w: `MOST_TAPS` in attended.h."""


def takes_convolution(x: Tensor, kernel: Tensor, geometry: Geometry, groups: int) -> bool:
    """Whether the compiled kernel does a convolution whose C1 input channels share `groups` = C1/r scales.

    C1 and C2 must be multiples of two vectors, and r of one.

    Shapes: x (N, C1, H, W), kernel (C2, C1, h, w).
    """
    library = native.library
    if library is None or geometry.groups > 1 or not native.takes(x, kernel) or torch.is_autocast_enabled("cpu"):
        return False
    (outputs, inputs), pair, reduction = kernel.shape[:2], 2 * library.lanes, kernel.shape[1] // groups
    in_vectors = inputs % pair == outputs % pair == reduction % library.lanes == pair % reduction == 0
    return in_vectors and math.prod(geometry.size) <= MOST_TAPS


class _Numbers(ctypes.Structure):
    """`struct Conv` in attended.h."""

    _fields_ = fields(
        ctypes.c_int,
        "batch c1 c2 height width r kernel_height kernel_width stride_y stride_x padding_y padding_x "
        "dilation_y dilation_x out_height out_width",
    )


_forward_kernel = Kernel("attended_forward", _Numbers, tensors=5)
_backward_kernel = Kernel("attended_backward", _Numbers, tensors=9)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
KernelGradients = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write conv(x[n], K_n) of every sample to `out`.

    Shapes, all dense: x (N, C1, H, W), K (C2, C1 h w), s (C1/r, C2), A2 (N, C1/r, h w), out (N, C2, H', W').
    """
    numbers, inputs, of_out = _arguments((x, kernel, mixing, scales), geometry)
    _forward_kernel(numbers, *inputs, (out, of_out))


def backward(
    d_out: Tensor, inputs: Inputs, geometry: Geometry, dx: Tensor | None, rest: KernelGradients | None
) -> None:
    """Write the gradient of x to `dx`, and the gradients of K, s and A2 to `rest`; None skips them.

    Shapes, all dense: inputs as for `forward`, each gradient in its input's shape.
    """
    numbers, arguments, of_out = _arguments(inputs, geometry)
    of_x, *of_rest = (shape for _, shape in arguments)
    results: list[Argument | None] = [None if dx is None else (dx, of_x)]
    results += [None] * 3 if rest is None else zip(rest, of_rest, strict=True)
    _backward_kernel(numbers, *arguments, (d_out, of_out), *results)


def _arguments(
    inputs: Inputs, geometry: Geometry
) -> tuple[_Numbers, list[tuple[Tensor, tuple[int, ...]]], tuple[int, ...]]:
    """Numbers and inputs that both kernels take, and the shape of the result."""
    x, kernel, mixing, _ = inputs
    batch, c1, height, width = x.shape
    c2, groups, taps = len(kernel), len(mixing), math.prod(geometry.size)
    over = *geometry.size, *geometry.stride, *geometry.padding, *geometry.dilation
    out_size = geometry.out_size(x)
    numbers = _Numbers(batch, c1, c2, height, width, c1 // groups, *over, *out_size)
    shapes = (batch, c1, height, width), (c2, c1 * taps), (groups, c2), (batch, groups, taps)
    return numbers, list(zip(inputs, shapes, strict=True)), (batch, c2, *out_size)
