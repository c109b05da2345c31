"""Attention-weights convolution (AW): every sample's attention scales the kernel itself.

Paper: `An Attention Module for Convolutional Neural Networks` (Zhu Baozhou, Hofstee, Lee, Al-Ars), arXiv 2108.08205.
Status: our reading of AW. The map's shape, conv(I (x) A, K) = conv(I, A (x) K), the order of operations and the
residual follow the paper; widths, groups and reduction are [ours].
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from augment_cli.layers.aw.attended import attended_conv, choose_backend
from augment_cli.layers.aw.backend import Backend
from augment_cli.layers.aw.per_sample import conv_of_each
from augment_cli.layers.geometry import Geometry, Pair
from augment_cli.layers.leaf import record_call, refuse_old_onnx, refuse_script


class AWConv2d(nn.Conv2d):
    """Convolution whose kernel K is scaled, for every sample, by an attention map A of the kernel's shape.

        O  = conv(I, K + A (x) K)
        A0 = adaptive average pool of I to the kernel's size         N, C1, h, w
        A1 = ReLU(reduce(A0))                                        N, C1/r, h, w
        A2 = ReLU(mix(A1))                                           N, C1/r, h, w
        A3 = expand(A2), in C1/r groups of one channel               N, C2 C1/r, h, w
        A  = every map of A3 repeated r times along the inputs       N, C2, C1, h, w

    `expand` starts at zero, so that a fresh layer computes the plain convolution.

    A grouped kernel is the dense one with only the blocks on its diagonal, and the same formula holds for its entries:
    each output channel meets a = max(1, C1/groups/r) maps, and A3 has C2 a channels. On a depthwise convolution every
    channel's kernel has a map of its own, scaled from one that r channels share. [ours]

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            in `nn.Conv2d` and in its order, except that padding="same" is TensorFlow's, for any stride.
        reduction: r, the number of input channels that share a map. `fitting_reduction` may lower it.
        standardize: weight standardisation, applied to the kernel before the attention; None for none.

    Raises:
        ValueError: `reduction` is less than 1, or `padding_mode` is not "zeros".

    Example:
        >>> layer = AWConv2d(32, 48, 3, padding=1)
        >>> layer(torch.zeros(2, 32, 8, 10)).shape
        torch.Size([2, 48, 8, 10])
    """

    backend: Backend = "auto"
    """Backend of the convolution; "auto" lets `attended.choose_backend` decide at each call."""

    kernel_size: Pair
    stride: Pair
    padding: str | Pair
    dilation: Pair

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reduction: int = 16,
        standardize: nn.Module | None = None,
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode={padding_mode!r}: attended kernels pad with zeros only")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.same_pad = padding == "same"
        fixed_padding = 0 if self.same_pad else padding
        super().__init__(in_channels, out_channels, kernel_size, stride, fixed_padding, dilation, groups, bias, **dd)
        self.reduction = fitting_reduction(in_channels, reduction, groups)
        hidden = in_channels // self.reduction
        self.maps = max(1, hidden // groups)  # a, the maps that an output channel meets
        self.standardize = standardize
        self.reduce = nn.Conv2d(in_channels, hidden, 1, bias=False, **dd)
        self.mix = nn.Conv2d(hidden, hidden, 1, bias=False, **dd)
        self.expand = Expand(hidden, out_channels * self.maps, **dd)
        self.reset_attention_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "expand"):  # nn.Conv2d's constructor calls this earlier
            self.reset_attention_parameters()

    def reset_attention_parameters(self) -> None:
        """Set `expand` to zero, and the two others to He-normal for the ReLU that follows. [ours]"""
        for layer in (self.reduce, self.mix):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(self.expand.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (N, C1, H, W) to (N, C2, H', W'), H' and W' as `nn.Conv2d` gives them."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if torch.jit.is_tracing():
            refuse_old_onnx(self)
        scales, kernel = self.scales(x), self.static_kernel()
        if self.same_pad:
            x = _pad_same(x, self.kernel_size, self.stride, self.dilation)
        backend = self.backend
        if backend == "auto":
            backend = choose_backend(x, kernel, self.geometry, self.expand.groups)
        if backend == "grouped":
            out = conv_of_each(x, self._attended(kernel, scales), self.geometry)
        else:
            mixing = self.expand.weight.view(-1, self.out_channels)  # C1/r, C2
            out = attended_conv(x, kernel, mixing, scales, self.geometry, backend)
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    @property
    def geometry(self) -> Geometry:
        padding = (0, 0) if isinstance(self.padding, str) else self.padding  # "valid": "same" is padded beforehand
        return Geometry(self.kernel_size, self.stride, padding, self.dilation, self.groups)

    def static_kernel(self) -> Tensor:
        """K, standardised where the layer does so: (C2, C1/groups, h, w)."""
        return self.weight if self.standardize is None else self.standardize(self.weight)

    def attended_kernels(self, x: Tensor) -> Tensor:
        """K + A (x) K of every sample: (N, C2, C1/groups, h, w)."""
        return self._attended(self.static_kernel(), self.scales(x))

    def _attended(self, kernel: Tensor, scales: Tensor) -> Tensor:
        blocks = self.expand.groups // self.maps, self.maps, -1
        maps = self.expand(scales).unflatten(1, blocks).transpose(2, 3).flatten(1, 2)  # N, C2, a, h, w
        factors = (1 + maps).contiguous()  # else the product takes its strides from them, and is copied
        grouped = kernel.unflatten(1, (self.maps, -1))  # C2, a, inputs that share a map, h, w
        return (factors.unsqueeze(3) * grouped).flatten(2, 3)

    def scales(self, x: Tensor) -> Tensor:
        """A2, one number for each group of input channels and kernel tap: (N, C1/r, h, w)."""
        return F.relu(self.mix(F.relu(self.reduce(_pool(x, self.kernel_size)))))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction}{', same_pad' if self.same_pad else ''}"


class Expand(nn.Module):
    """1x1 convolution in groups of one input channel, zero at the start.

    This is not an `nn.Conv2d`, so that functions that initialise every convolution of a model keep the zeros.
    """

    def __init__(
        self,
        groups: int,
        out_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(out_channels, 1, 1, 1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (N, groups, h, w) to (N, out_channels, h, w)."""
        return F.conv2d(x, self.weight, groups=self.groups)

    def extra_repr(self) -> str:
        return f"{self.groups}, {len(self.weight)}"


def fitting_reduction(in_channels: int, reduction: int, groups: int = 1) -> int:
    """The largest r up to `reduction` for which `fits_groups` holds."""
    if reduction < 1:
        raise ValueError(f"reduction={reduction} is less than 1")
    return next(r for r in range(min(reduction, in_channels), 0, -1) if fits_groups(r, in_channels, groups))


def fits_groups(reduction: int, in_channels: int, groups: int) -> bool:
    """Whether r divides the input channels, and each r channels that share a map lie in one group or fill groups."""
    inputs = in_channels // groups
    return in_channels % reduction == 0 and (inputs % reduction == 0 or reduction % inputs == 0)


def _pool(x: Tensor, size: Pair) -> Tensor:
    """F.adaptive_avg_pool2d. Shapes: x (N, C, H, W) to (N, C, h, w).

    On CUDA torch's gradient is summed by atomics, and refused in deterministic mode: there it is a product.
    """
    if x.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return pool_by_product(x, size)
    return F.adaptive_avg_pool2d(x, size)


def pool_by_product(x: Tensor, size: Pair) -> Tensor:
    """F.adaptive_avg_pool2d as a product with a matrix of zeros and ones. Shapes: x (N, C, H, W) to (N, C, h, w)."""
    rows, columns = (_windows(n, count, x) for n, count in zip(x.shape[2:], size, strict=True))
    sums = torch.einsum("ncyx,hy,wx->nchw", x, rows, columns)
    return sums / (rows.sum(1)[:, None] * columns.sum(1)).to(sums.dtype)


def _windows(size: int, count: int, like: Tensor) -> Tensor:
    """Which of `size` positions are in each window of an adaptive pool: (count, size), ones and zeros."""
    i, position = torch.arange(count, device=like.device)[:, None], torch.arange(size, device=like.device)
    return ((position >= i * size // count) & (position < -(-(i + 1) * size // count))).to(like.dtype)


def _pad_same(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Pad as TensorFlow's SAME does: ceil(size / stride) outputs, and an odd padding is longer at the end."""
    pads: list[int] = []
    for size, k, s, d in zip(x.shape[:-3:-1], kernel_size[::-1], stride[::-1], dilation[::-1], strict=True):
        total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
