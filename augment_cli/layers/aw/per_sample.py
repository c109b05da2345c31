"""A convolution with one kernel for each sample, from operations that have derivatives of every order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from augment_cli.layers.geometry import Geometry


def conv_of_each(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """conv(x[n], kernels[n]) as one convolution: the samples are channels of one map, in a group each.

    Under tracers and exporters it is `product_of_each`.

    Shapes: x (N, C1, H, W), kernels (N, C2, C1/groups, h, w); to (N, C2, H', W').
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return product_of_each(x, kernels, geometry)
    batch = x.shape[0]
    if batch == 0:  # a convolution needs at least one group
        return F.conv2d(x, kernels.sum(0), None, *geometry.options, geometry.groups)
    out = F.conv2d(as_channels(x), kernels.flatten(0, 1), None, *geometry.options, batch * geometry.groups)
    return out.unflatten(1, (batch, -1)).squeeze(0)


def product_of_each(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The same by matrix products, whose record serves every batch size; a number of groups would fix it.

    Shapes: as for `conv_of_each`.
    """
    windows = F.unfold(x, geometry.size, geometry.dilation, geometry.padding, geometry.stride)
    windows = windows.unflatten(1, (geometry.groups, -1))  # N, groups, C1/groups h w, H'W'
    rows = kernels.flatten(2).unflatten(1, (geometry.groups, -1))  # N, groups, C2/groups, C1/groups h w
    return (rows @ windows).flatten(1, 2).unflatten(2, geometry.out_size(x))


def as_channels(x: Tensor) -> Tensor:
    """(N, C, H, W) to (1, N C, H, W)."""
    return x.reshape(1, -1, *x.shape[2:])
