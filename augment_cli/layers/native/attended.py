"""The convolution of AW as one compiled kernel. `attended.h` says how it is arranged."""

import ctypes

import torch
from torch import Tensor

from augment_cli.layers.native import Kernel, fields, lanes, takes
from augment_cli.layers.per_sample import Geometry

MOST_TAPS = 49
"""Of a kernel."""


def takes_convolution(x: Tensor, kernel: Tensor, geometry: Geometry, groups: int) -> bool:
    """Whether there is a compiled kernel for a convolution in which `groups` of input channels have scales.

    Shapes: x (N, C1, H, W), kernel (C2, C1, h, w).
    """
    if geometry.groups > 1 or not takes(x, kernel) or torch.is_autocast_enabled("cpu"):
        return False
    (outputs, inputs), pair, reduction = kernel.shape[:2], 2 * lanes(), kernel.shape[1] // groups
    in_vectors = inputs % pair == outputs % pair == reduction % lanes() == pair % reduction == 0
    return in_vectors and kernel[0, 0].numel() <= MOST_TAPS


class _Numbers(ctypes.Structure):
    """`struct Conv` in attended.h."""

    _fields_ = fields(
        ctypes.c_int,
        "batch c1 c2 height width r kernel_height kernel_width stride_y stride_x padding_y padding_x "
        "dilation_y dilation_x out_height out_width",
    )


_forward_kernel = Kernel("attended_forward", _Numbers, tensors=5)
_backward_kernel = Kernel("attended_backward", _Numbers, tensors=9)


def forward(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write conv(x[n], K_n) of every sample to `out`.

    Shapes, all dense: x (N, C1, H, W), K (C2, C1 h w), s (C1/r, C2), A2 (N, C1/r, h w), out (N, C2, H', W').
    """
    numbers, inputs, of_out = _arguments((x, kernel, mixing, scales), geometry)
    _forward_kernel(numbers, *inputs, (out, of_out))


def backward(
    d_out: Tensor, inputs: tuple[Tensor, ...], geometry: Geometry, dx: Tensor | None, rest: tuple[Tensor, ...] | None
) -> None:
    """Write the gradient of x to `dx`, and those of K, s and A2 to `rest`, unless they are None.

    Shapes: inputs as for `forward`, gradients as what they are of, dense too.
    """
    numbers, arguments, of_out = _arguments(inputs, geometry)
    shapes = [shape for _, shape in arguments]
    of_inputs = None if dx is None else (dx, shapes[0])
    of_rest = zip(rest, shapes[1:], strict=True) if rest else [None] * 3
    _backward_kernel(numbers, *arguments, (d_out, of_out), of_inputs, *of_rest)


def _arguments(inputs: tuple[Tensor, ...], geometry: Geometry) -> tuple[_Numbers, list, tuple[int, ...]]:
    """Numbers and inputs of a call of either kernel, and the shape of the result."""
    x, kernel, mixing, _ = inputs
    (batch, c1, height, width), c2, groups, taps = (
        x.shape,
        len(kernel),
        len(mixing),
        geometry.size[0] * geometry.size[1],
    )
    over = *geometry.size, *geometry.stride, *geometry.padding, *geometry.dilation
    out_size = geometry.out_size(x)
    numbers = _Numbers(batch, c1, c2, height, width, c1 // groups, *over, *out_size)
    shapes = (batch, c1, height, width), (c2, c1 * taps), (groups, c2), (batch, groups, taps)
    return numbers, list(zip(inputs, shapes, strict=True)), (batch, c2, *out_size)
