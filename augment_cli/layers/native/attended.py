"""The convolution of AW as one compiled kernel. `attended.cpp` says how it is arranged."""

import ctypes

import torch
from torch import Tensor

from augment_cli.layers.native import kernels, lanes, pointer, takes
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


def forward(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write conv(x[n], K_n) of every sample to `out`.

    Shapes, all dense: x (N, C1, H, W), K (C2, C1 h w), s (C1/r, C2), A2 (N, C1/r, h w), out (N, C2, H', W').
    """
    numbers, place, threads = _call(x, kernel, mixing, geometry, backward=False)
    kernels().attended_forward(numbers, *map(pointer, (x, kernel, mixing, scales, out, place)), threads)


def backward(
    d_out: Tensor, inputs: tuple[Tensor, ...], geometry: Geometry, dx: Tensor | None, rest: tuple[Tensor, ...] | None
) -> None:
    """Write the gradient of x to `dx`, and those of K, s and A2 to `rest`, unless they are None.

    Shapes: inputs as for `forward`, gradients as what they are of, dense too.
    """
    x, kernel, mixing, _ = inputs
    numbers, place, threads = _call(x, kernel, mixing, geometry, backward=True)
    tensors = *inputs, d_out, dx, *(rest or [None] * 3), place
    kernels().attended_backward(numbers, *map(pointer, tensors), threads)


def _call(x: Tensor, kernel: Tensor, mixing: Tensor, geometry: Geometry, backward: bool):
    """The numbers of `struct Conv` in attended.cpp, scratch memory, and the number of threads."""
    channels = x.shape[1], len(kernel)
    over = *geometry.size, *geometry.stride, *geometry.padding, *geometry.dilation
    numbers = len(x), *channels, *x.shape[2:], x.shape[1] // len(mixing), *over, *geometry.out_size(x)
    numbers = (ctypes.c_int * len(numbers))(*numbers)
    threads, scratch = torch.get_num_threads(), kernels().attended_scratch
    scratch.restype = ctypes.c_long
    return numbers, x.new_empty(scratch(numbers, backward, threads)), threads
