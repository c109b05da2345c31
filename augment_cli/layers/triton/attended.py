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

# Positions, output channels and input channels in a block, warps, and stages of the loops' loads, by how products are
# computed. The axis that a kernel sums over is the shortest. Blocks are about as large as registers allow
# (benchmarks/compiled_kernels.py). Nothing has been timed; benchmarks/gpu_tune.py does.
BLOCKS = {
    "conv_forward": {"ieee": (64, 32, 16, 4, 1), "tf32": (128, 64, 32, 4, 3), "half": (128, 64, 32, 4, 3)},
    "maps_backward": {"ieee": (64, 16, 32, 4, 1), "tf32": (128, 32, 64, 4, 3), "half": (128, 32, 64, 4, 3)},
    "kernel_backward": {"ieee": (32, 32, 32, 4, 1), "tf32": (32, 64, 32, 4, 3), "half": (64, 64, 64, 4, 3)},
}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
KernelGradients = tuple[Tensor, Tensor, Tensor]


def forward(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, out: Tensor) -> None:
    """Write conv(x[n], K_n) of every sample to `out`.

    Shapes: x (N, C1, H, W), out (N, C2, H', W'), of any strides; dense are K (C2, T, G, r), s (C2, G), A2 (N, T, G).
    """
    if out.numel():
        call = _Call(kernels.conv_forward, (x, kernel, mixing, scales), geometry, math.prod(geometry.out_size(x)))
        grid = len(x) * call.blocks_of_positions * call.blocks_of_outputs
        call.run(grid, (x, kernel, mixing, scales, out), (*x.stride(), *out.stride()))


def maps_backward(d_out: Tensor, inputs: Inputs, geometry: Geometry, dx: Tensor) -> None:
    """Write the gradient of x to `dx`, of any strides. Shapes: as for `forward`."""
    if dx.numel():
        x, *rest = inputs
        call = _Call(kernels.maps_backward, inputs, geometry, math.prod(x.shape[2:]))
        grid = len(x) * call.blocks_of_positions * call.blocks_of_inputs
        call.run(grid, (d_out, *rest, dx), (*d_out.stride(), *dx.stride()))


def kernel_backward(d_out: Tensor, inputs: Inputs, geometry: Geometry) -> KernelGradients:
    """Gradients of K, s and A2, float32, in their shapes. Shapes: as for `forward`."""
    x, kernel, mixing, scales = inputs
    if not len(x):
        return torch.zeros_like(kernel).float(), torch.zeros_like(mixing).float(), torch.zeros_like(scales).float()
    call = _Call(kernels.kernel_backward, inputs, geometry, math.prod(geometry.out_size(x)))
    programs = call.blocks_of_inputs * call.blocks_of_outputs * call.taps
    samples = -(-len(x) // max(1, min(len(x), PROGRAMS // programs)))  # that one program sums over
    splits = -(-len(x) // samples)
    shapes = (
        (splits, *kernel.shape),
        (splits * call.taps * call.parts, *mixing.shape),
        (call.blocks_of_outputs * call.parts, *scales.shape),
    )
    of_kernel, of_mixing, of_scales = (torch.empty(s, dtype=torch.float32, device=x.device) for s in shapes)
    tensors = d_out, x, kernel, mixing, scales, of_kernel, of_mixing, of_scales
    call.run(splits * programs, tensors, (*d_out.stride(), *x.stride(), len(x)), samples)
    return of_kernel.sum(0), of_mixing.sum(0), of_scales.sum(0)


class _Call:
    """A launch of one of the kernels: its blocks, constants and the arguments that all of them take."""

    def __init__(self, kernel: Any, inputs: Inputs, geometry: Geometry, positions: int) -> None:
        x, weight, _, _ = inputs
        outputs, _, groups, r = weight.shape
        products = "half" if x.dtype != torch.float32 else "tf32" if _allows_tf32() else "ieee"
        block, of_outputs, of_inputs, warps, stages = BLOCKS[kernel.__name__][products]
        block, channels = min(padded(positions), block), min(padded(r, 1), of_inputs)
        self.kernel, self.geometry, self.taps = kernel, geometry, math.prod(geometry.size)
        self.parts = -(-r // channels)  # of a group
        self.blocks_of_positions, self.blocks_of_outputs = -(-positions // block), -(-outputs // of_outputs)
        self.blocks_of_inputs = -(-groups // (of_inputs // channels)) * self.parts
        self.sizes = groups * r, outputs, *x.shape[2:], *geometry.out_size(x), groups, r, self.taps, geometry.size[1]
        precision = "interpreted" if is_interpreted() else "tf32" if products == "tf32" else "ieee"
        constants = {"BP": block, "BO": of_outputs, "BG": of_inputs // channels, "BR": channels, "PRECISION": precision}
        self.options = {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}

    def run(self, grid: int, tensors: tuple[Tensor, ...], strides: tuple[int, ...], *more: int) -> None:
        """Launch `grid` programs."""
        over = [n for pair in self.geometry.options for n in pair]
        with on_device_of(tensors[0]):
            self.kernel[(grid,)](*tensors, *strides, *self.sizes, *over, *more, **self.options)


def _allows_tf32() -> bool:
    """Whether torch allows TF32 in convolutions, which AW's is one of; by default it does."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
