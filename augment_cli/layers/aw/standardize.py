"""Weight standardisation of kernels, before AW's attention scales them.

Papers: `Micro-Batch Training with Batch-Channel Normalization and Weight Standardization`, arXiv 1903.10520;
`Characterizing signal propagation to close the performance gap in unnormalized ResNets`, arXiv 2101.08692.
"""

import torch
from torch import Tensor, nn


class Standardize(nn.Module):
    """Bring every filter to mean 0 and variance 1: (w - mean) / sqrt(var + eps), with the biased variance.

    Shapes: (C2, C1, h, w) to the same.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        variance, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
        return (weight - mean) * torch.rsqrt(variance + self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class ScaledStandardize(Standardize):
    """Standardise filters, times a learned `gain` (C2, 1, 1, 1) and a fixed `scale`, gamma / sqrt(fan-in)."""

    def __init__(
        self,
        out_channels: int,
        scale: float,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(eps)
        self.scale = scale
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1, device=device, dtype=dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) * (self.gain * self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale:.4g}, {super().extra_repr()}"
