"""Call the Triton kernels of AW's convolution, `attended_kernels.py`. Importing this imports Triton."""

import math
from typing import Any

import torch
from torch import Tensor

from augment_cli.layers.geometry import Geometry
from augment_cli.layers.triton import attended_kernels as kernels
from augment_cli.layers.triton import is_interpreted, on_device_of, padded

PROGRAMS = 1024
"""Programs that fill a large GPU several times over: where a kernel has fewer blocks, its gradient is summed over parts
of the batch. Arithmetic (132 SMs of an H100), not measured."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
KernelGradients = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write conv(x[n], K_n) of every sample to `out`.

    Shapes: x (N, C1, H, W), out (N, C2, H', W'), of any strides; dense are K (C2, T, G, r), s (C2, G), A2 (N, T, G).
    """
    if out.numel():
        call = _Call((x, kernel, mixing, scales), geometry)
        positions = math.prod(geometry.out_size(x))
        options = call.options(positions)
        grid = len(x) * -(-positions // options["BP"]) * call.blocks_of_outputs
        strides = *x.stride(), *out.stride()
        call.run(kernels.conv_forward, grid, (x, kernel, mixing, scales, out), strides, options)


def maps_backward(d_out: Tensor, inputs: Inputs, geometry: Geometry, dx: Tensor) -> None:
    """Write the gradient of x to `dx`, of any strides. Shapes: as for `forward`."""
    if not dx.numel():
        return
    x, *rest = inputs
    call = _Call(inputs, geometry)
    positions = math.prod(x.shape[2:])
    options = call.options(positions)
    grid = len(x) * -(-positions // options["BP"]) * call.blocks_of_inputs
    call.run(kernels.maps_backward, grid, (d_out, *rest, dx), (*d_out.stride(), *dx.stride()), options)


def kernel_backward(d_out: Tensor, inputs: Inputs, geometry: Geometry) -> KernelGradients:
    """Gradients of K, s and A2, float32, in their shapes. Shapes: as for `forward`."""
    x, kernel, mixing, scales = inputs
    call = _Call(inputs, geometry)
    programs = call.blocks_of_inputs * call.blocks_of_outputs * call.taps
    splits = max(1, min(len(x), PROGRAMS // programs))
    samples = -(-len(x) // splits)
    splits = -(-len(x) // max(samples, 1))
    outputs, groups = mixing.shape
    of_kernel, of_mixing, of_scales = (
        torch.empty(shape, dtype=torch.float32, device=x.device)
        for shape in (
            (splits, *kernel.shape),
            (splits * call.taps * call.parts, outputs, groups),
            (call.blocks_of_outputs * call.parts, *scales.shape),
        )
    )
    if len(x):
        tensors = d_out, x, kernel, mixing, scales, of_kernel, of_mixing, of_scales
        options = call.options(math.prod(d_out.shape[2:]))
        strides = *d_out.stride(), *x.stride(), len(x)
        call.run(kernels.kernel_backward, splits * programs, tensors, strides, options, samples)
    return of_kernel.sum(0), of_mixing.sum(0), of_scales.sum(0)


class _Call:
    """Sizes of one call, and the arguments that all three kernels take."""

    def __init__(self, inputs: Inputs, geometry: Geometry) -> None:
        x, kernel, mixing, _ = self.inputs = inputs
        self.geometry, self.taps = geometry, math.prod(geometry.size)
        self.r, self.groups = kernel.shape[3], mixing.shape[1]
        self.exact = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32"
        # Blocks of output channels and of input channels: the largest whose numbers stay in registers, or nearly so
        # (benchmarks/kernels.py). Nothing here has been timed.
        self.outputs, inputs_at_once = (32, 16) if self.exact else (64, 32)
        self.channels = min(inputs_at_once, padded(self.r, 1))
        self.groups_at_once = inputs_at_once // self.channels
        self.parts = -(-self.r // self.channels)
        self.blocks_of_outputs = -(-len(kernel) // self.outputs)
        self.blocks_of_inputs = -(-self.groups // self.groups_at_once) * self.parts

    def options(self, positions: int) -> dict[str, Any]:
        """Constants that a kernel is compiled for, and the options of its launch."""
        precision = "interpreted" if is_interpreted() else "ieee" if self.exact else "tf32"
        sizes = {"BP": min(padded(positions), 64), "BO": self.outputs}
        sizes |= {"BG": self.groups_at_once, "BR": self.channels, "PRECISION": precision}
        return {**sizes, "num_warps": 4, "num_stages": 1 if self.exact else 2, "enable_fp_fusion": True}

    def run(
        self, kernel: Any, grid: int, tensors: tuple[Tensor, ...], strides: tuple[int, ...], options: dict, *more: int
    ) -> None:
        """Launch a kernel of `grid` programs."""
        x, weight, _, _ = self.inputs
        c1, c2 = x.shape[1], len(weight)
        sizes = c1, c2, *x.shape[2:], *self.geometry.out_size(x), self.groups, self.r, self.taps, self.geometry.size[1]
        over = [n for pair in self.geometry.options for n in pair]
        with on_device_of(x):
            kernel[(grid,)](*tensors, *strides, *sizes, *over, *more, **options)
