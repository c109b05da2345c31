"""The interface of the backends of AW's convolution, and the derivatives that all of them share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from augment_cli.layers.aw.per_sample import conv_of_each
from augment_cli.layers.geometry import Geometry

Backend = Literal["auto", "grouped", "chunked", "unfolded", "static", "native", "triton"]

Arranged = tuple[Tensor, Tensor, Tensor]
"""Kernel, mixing and scales in a backend's order of axes, in which mixing * scales[n] broadcasts to the kernel."""


class Sums(NamedTuple):
    """Gradients of the kernel, of mixing and of the scales, arranged, in float32 or wider; zero at the start."""

    kernel: Tensor
    mixing: Tensor
    scales: Tensor


@dataclass(frozen=True)
class ConvBackend(ABC):
    """One exact algorithm for O[n] = conv(I[n], K_n), K_n = K (1 + s A2[n]), on a dense kernel K."""

    name: ClassVar[Backend]
    geometry: Geometry

    @staticmethod
    @abstractmethod
    def arranged(kernel: Tensor, mixing: Tensor, scales: Tensor) -> Arranged:
        """Bring the axes into the backend's order.

        Shapes: K (C2, C1, h, w), s (C1/r, C2), A2 (N, C1/r, h, w). The results of `arranged` have four axes each, and
        the first of them is C2, C2 and N.
        """

    @abstractmethod
    def natural(self, kernels: Tensor) -> Tensor:
        """Inverse of `arranged` for a kernel, or for the kernels of some samples: to (..., C2, C1, h, w)."""

    @abstractmethod
    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write the result to `out`. Shapes: x (N, C1, H, W); out (N, C2, H', W'); the others as `arranged`."""

    @abstractmethod
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
        """Write the gradient of x to `dx`, and add the others to `sums`; None skips them. Shapes: as for `run`."""

    def differentiable(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor) -> Tensor:
        """The result from operations that have derivatives of every order. Shapes: as for `run`."""
        kernels = self.natural(kernel + kernel * (mixing * scales[:, None]))
        return conv_of_each(x, kernels.to(x.dtype), self.geometry)

    def tangent(
        self,
        x: Tensor,
        kernel: Tensor,
        mixing: Tensor,
        scales: Tensor,
        t_x: Tensor,
        t_kernel: Tensor,
        t_mixing: Tensor,
        t_scales: Tensor,
    ) -> Tensor:
        """Directional derivative along t, by the product rule: the result is linear in each of the four tensors."""
        scales, t_scales = scales[:, None], t_scales[:, None]
        kernels = kernel + kernel * (mixing * scales)
        t_kernels = t_kernel + t_kernel * (mixing * scales) + kernel * (t_mixing * scales + mixing * t_scales)
        kernels, t_kernels = (self.natural(k).to(x.dtype) for k in (kernels, t_kernels))
        return conv_of_each(t_x, kernels, self.geometry) + conv_of_each(x, t_kernels, self.geometry)


@dataclass(frozen=True)
class UsualOrder(ConvBackend):
    """Kernels in their usual order of axes, with groups of input channels apart: C2, C1/r, r, h w."""

    @staticmethod
    def arranged(kernel: Tensor, mixing: Tensor, scales: Tensor) -> Arranged:
        kernel = kernel.unflatten(1, (len(mixing), -1)).flatten(3)
        return kernel, mixing.t()[:, :, None, None].contiguous(), scales.flatten(2)[:, :, None]

    def natural(self, kernels: Tensor) -> Tensor:
        """(..., C2, C1/r, r, h w) to (..., C2, C1, h, w)."""
        return kernels.flatten(-3, -2).unflatten(-1, self.geometry.size)
