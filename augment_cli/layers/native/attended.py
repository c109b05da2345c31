"""The convolution of AW as one compiled kernel. `attended.h` says how it is arranged."""

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
    kernels.attended_forward(numbers, *map(pointer, (x, kernel, mixing, scales, out, place)), threads)


def backward(
    d_out: Tensor, inputs: tuple[Tensor, ...], geometry: Geometry, dx: Tensor | None, rest: tuple[Tensor, ...] | None
) -> None:
    """Write the gradient of x to `dx`, and those of K, s and A2 to `rest`, unless they are None.

    Shapes: inputs as for `forward`, gradients as what they are of, dense too.
    """
    x, kernel, mixing, _ = inputs
    numbers, place, threads = _call(x, kernel, mixing, geometry, backward=True)
    tensors = *inputs, d_out, dx, *(rest or [None] * 3), place
    kernels.attended_backward(numbers, *map(pointer, tensors), threads)


def _call(x: Tensor, kernel: Tensor, mixing: Tensor, geometry: Geometry, backward: bool):
    """The numbers of `struct Conv` in attended.h, scratch memory, and the number of threads."""
    channels = x.shape[1], len(kernel)
    over = *geometry.size, *geometry.stride, *geometry.padding, *geometry.dilation
    numbers = len(x), *channels, *x.shape[2:], x.shape[1] // len(mixing), *over, *geometry.out_size(x)
    numbers = (ctypes.c_int * len(numbers))(*numbers)
    scratch = kernels.attended_backward_scratch if backward else kernels.attended_forward_scratch
    threads = torch.get_num_threads()
    return numbers, x.new_empty(scratch(numbers, threads)), threads


@torch.library.custom_op("augment_cli::attended", mutates_args=(), device_types="cpu")
def operator(
    x: Tensor,
    kernel: Tensor,
    mixing: Tensor,
    scales: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """The same for torch.compile. Shapes: x (N, C1, H, W), K (C2, C1, h, w), s (C1/r, C2), A2 (N, C1/r, h, w)."""
    inputs, geometry = _arguments(x, kernel, mixing, scales, stride, padding, dilation)
    out = x.new_empty(len(x), len(kernel), *geometry.out_size(x))
    forward(*inputs, geometry, out)
    return out


@operator.register_fake
def _(x, kernel, mixing, scales, stride, padding, dilation):
    geometry = Geometry(kernel.shape[2:], stride, padding, dilation)
    return x.new_empty(x.shape[0], kernel.shape[0], *geometry.out_size(x))


@torch.library.custom_op("augment_cli::attended_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    d_out: Tensor,
    x: Tensor,
    kernel: Tensor,
    mixing: Tensor,
    scales: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, geometry = _arguments(x, kernel, mixing, scales, stride, padding, dilation)
    dx, *rest = (t.new_empty(t.shape) for t in (x, kernel, mixing, scales))
    backward(d_out.contiguous(), inputs, geometry, dx, tuple(rest))
    return dx, *rest


@_operator_backward.register_fake
def _(d_out, x, kernel, mixing, scales, stride, padding, dilation):
    return tuple(t.new_empty(t.shape) for t in (x, kernel, mixing, scales))


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(*tensors)


operator.register_autograd(
    lambda ctx, d_out: (
        *_operator_backward(d_out, *ctx.saved_tensors, ctx.stride, ctx.padding, ctx.dilation),
        None,
        None,
        None,
    ),
    setup_context=_save,
)


def _arguments(x, kernel, mixing, scales, stride, padding, dilation) -> tuple[tuple[Tensor, ...], Geometry]:
    geometry = Geometry(tuple(kernel.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    return tuple(t.contiguous() for t in (x, kernel, mixing, scales)), geometry
