"""The geometry of a convolution."""

from dataclasses import dataclass

from torch import Tensor

Pair = tuple[int, int]
"""Rows first, then columns."""


@dataclass(frozen=True)
class Geometry:
    """Kernel size, stride, padding, dilation and groups of a 2-D convolution."""

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int = 1

    @property
    def options(self) -> tuple[Pair, Pair, Pair]:
        """Stride, padding and dilation: a convolution's arguments in torch's order, without the groups."""
        return self.stride, self.padding, self.dilation

    def out_size(self, x: Tensor) -> Pair:
        """Height and width of the result for an input (N, C1, H, W)."""
        parts = zip(x.shape[2:], self.size, *self.options, strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)
        return rows, columns
