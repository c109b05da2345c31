"""A convolution with one kernel for every sample, from operations that have derivatives of every order."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over a map; pairs of numbers, rows first."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1

    @property
    def options(self) -> tuple:
        """The arguments of a convolution, in torch's order, the groups left out."""
        return self.stride, self.padding, self.dilation

    def out_size(self, x: Tensor) -> tuple[int, int]:
        parts = zip(x.shape[2:], self.size, *self.options, strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)
        return rows, columns


def conv_of_each(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """`grouped`, from differentiable operations: the samples as channels of one map, a group for each.

    Shapes: x (N, C1, H, W), kernels (N, C2, C1/groups, h, w); to (N, C2, H', W').
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return product_of_each(x, kernels, geometry)
    batch = x.shape[0]
    if batch == 0:  # there is no convolution in no groups
        return F.conv2d(x, kernels.sum(0), None, *geometry.options, geometry.groups)
    out = F.conv2d(as_channels(x), kernels.flatten(0, 1), None, *geometry.options, batch * geometry.groups)
    return out.unflatten(1, (batch, -1)).squeeze(0)


def product_of_each(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The same as products of matrices: what is recorded then serves every number of samples, groups would not.

    Shapes: as for `conv_of_each`.
    """
    windows = F.unfold(x, geometry.size, geometry.dilation, geometry.padding, geometry.stride)
    windows = windows.unflatten(1, (geometry.groups, -1))  # N, groups, C1/groups h w, H'W'
    rows = kernels.flatten(2).unflatten(1, (geometry.groups, -1))  # N, groups, C2/groups, C1/groups h w
    return (rows @ windows).flatten(1, 2).unflatten(2, geometry.out_size(x))


def as_channels(x: Tensor) -> Tensor:
    """(N, C, H, W) to (1, N C, H, W)."""
    return x.reshape(1, -1, *x.shape[2:])


@dataclass(frozen=True)
class Way:
    """An order of the kernel's axes in which factors broadcast, and what is done with the samples."""

    name: ClassVar[str]
    geometry: Geometry

    def differentiable(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor) -> Tensor:
        """The same from operations that have derivatives of every order."""
        kernels = self.natural(kernel + kernel * (mixing * scales[:, None]))
        return conv_of_each(x, kernels.to(x.dtype), self.geometry)

    def tangent(self, x, kernel, mixing, scales, t_x, t_kernel, t_mixing, t_scales) -> Tensor:
        """Derivative along t, by the rule for products: linear in the input, in the kernel, in mixing and in scales."""
        scales, t_scales = scales[:, None], t_scales[:, None]
        kernels = kernel + kernel * (mixing * scales)
        t_kernels = t_kernel + t_kernel * (mixing * scales) + kernel * (t_mixing * scales + mixing * t_scales)
        kernels, t_kernels = (self.natural(k).to(x.dtype) for k in (kernels, t_kernels))
        return conv_of_each(t_x, kernels, self.geometry) + conv_of_each(x, t_kernels, self.geometry)
