"""Attention-augmented convolution (AA): part of the output channels come from self-attention.

Paper: `Attention Augmented Convolutional Networks` (Bello, Zoph, Vaswani, Shlens, Le), arXiv 1904.09925.
Status: exact by the paper's formulas; what the paper leaves open is marked [ours].
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import Proxy

from augment_cli.compat import pair
from augment_cli.layers.aa.attention import Backend, attention
from augment_cli.layers.aa.pooling import average_pool
from augment_cli.layers.aa.relative import resize_table, table_rows
from augment_cli.layers.leaf import record_call, refuse_old_onnx, refuse_script


class AAConv2d(nn.Module):
    """Convolution some of whose output channels come from self-attention over the input map.

        AAConv(X) = Concat[ Conv(X), MHA(X) ]            F_out - d_v channels, then d_v channels
        MHA(X)    = Concat[O_1 .. O_heads] W^O
        O_h       = softmax( (Q K^T + S_H + S_W) / sqrt(d_k / heads) ) V

    Submodules: `conv`, the convolution branch (None where value_channels equals out_channels); `qkv`, a 1x1
    convolution to q, k, v in that order, channels head-major; `proj`, W^O as a 1x1 convolution. Parameters `rel_height`
    (2H-1, d_k/heads) and `rel_width` (2W-1, d_k/heads), for the H x W map that the attention runs on.

    With a stride, 3x3 average pooling brings the input to the output's resolution before the attention; padding does
    not count in the mean [pooling: ours]. `attention_pool` > 1 pools once more, and the attention's result is
    interpolated bilinearly to the output's size.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as in `nn.Conv2d`. With less
            padding than keeps the map's size, the attention sees the input without the border on which no window is
            centred.
        heads: attention heads.
        key_channels: d_k, over all heads; a multiple of `heads`.
        value_channels: d_v, over all heads; a multiple of `heads`, at most `out_channels`.
        resolution: (height, width) of the output map for which the relative tables are made. For other sizes they are
            resized.
        attention_pool: factor by which the attention's map is smaller than the output map, rounded up.
        qkv_bias, proj_bias: biases in the two 1x1 convolutions; the paper has none.
        reorder: keep a buffer `channel_order`, so that attention can replace any output channels, not only the last:
            output channel c is channel channel_order[c] of the concatenation.
        conv_layer: makes the convolution branch; takes the arguments of `nn.Conv2d`.

    Raises:
        ValueError: `heads` does not divide the channels, or a value is out of range.

    Example:
        >>> split = {"heads": 4, "key_channels": 32, "value_channels": 16}
        >>> layer = AAConv2d(64, 128, 3, stride=2, padding=1, **split, resolution=(7, 9))
        >>> layer(torch.zeros(1, 64, 14, 18)).shape
        torch.Size([1, 128, 7, 9])
    """

    backend: Backend = "auto"
    """Backend of the attention; "auto" lets `attention.choose_backend` decide at each call."""

    conv: nn.Conv2d | None
    channel_order: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        heads: int,
        key_channels: int,
        value_channels: int,
        resolution: int | tuple[int, int],
        attention_pool: int = 1,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        reorder: bool = False,
        conv_layer: Callable[..., nn.Conv2d] = nn.Conv2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_split(out_channels, heads, key_channels, value_channels, attention_pool)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = pair(kernel_size), pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.border = _border(self.kernel_size, self.padding, self.dilation)
        self.heads, self.key_channels, self.value_channels = heads, key_channels, value_channels
        self.resolution, self.attention_pool = pair(resolution), attention_pool
        if min(self.resolution) < 1:
            raise ValueError(f"resolution={self.resolution} is not a map of at least one position")

        conv_channels = out_channels - value_channels
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        options |= {"bias": bias, **dd}
        self.conv = conv_layer(in_channels, conv_channels, kernel_size, **options) if conv_channels else None
        self.qkv = nn.Conv2d(in_channels, 2 * key_channels + value_channels, 1, bias=qkv_bias, **dd)
        self.proj = Projection(value_channels, value_channels, 1, bias=proj_bias, **dd)
        height, width = (math.ceil(size / attention_pool) for size in self.resolution)
        self.rel_height = nn.Parameter(torch.empty(table_rows(height), key_channels // heads, **dd))
        self.rel_width = nn.Parameter(torch.empty(table_rows(width), key_channels // heads, **dd))
        order = torch.arange(out_channels, device=device) if reorder else None
        self.register_buffer("channel_order", order)
        self.reset_attention_parameters()

    @property
    def weight(self) -> Tensor:
        """Filters of the convolution branch, for code that initialises every convolution of a model."""
        if self.conv is None:
            raise AttributeError("an attention-augmented convolution without a convolution branch has no weight")
        return self.conv.weight

    def reset_parameters(self) -> None:
        if self.conv is not None:
            self.conv.reset_parameters()
        self.reset_attention_parameters()

    def reset_attention_parameters(self) -> None:
        """Draw normal numbers: standard deviation (d_k/heads)^(-1/2) in tables, fan-in^(-1/2) in projections. [ours]"""
        for table in (self.rel_height, self.rel_width):
            nn.init.normal_(table, std=table.shape[1] ** -0.5)
        for layer in (self.qkv, self.proj):
            nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (N, in_channels, H, W) to (N, out_channels, H', W'), H' and W' as `nn.Conv2d` gives them."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if torch.jit.is_tracing():
            refuse_old_onnx(self)
        convolved = None if self.conv is None else self.conv(x)  # first, while x is in the cache
        reduced = self.reduce_to_output(x)
        attended = self.attend(self.pool_for_attention(reduced))
        size = list(reduced.shape[-2:] if convolved is None else convolved.shape[-2:])
        if list(attended.shape[-2:]) != size:
            attended = F.interpolate(attended, size=size, mode="bilinear", align_corners=False)
        out = attended if convolved is None else torch.cat([convolved, attended.to(convolved.dtype)], dim=1)
        if self.channel_order is None:
            return out
        if torch.jit.is_tracing() or torch.compiler.is_compiling():  # both reject a Function that defines jvp
            return out.index_select(1, self.channel_order)
        return _reorder(out, self.channel_order)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def reduce_to_output(self, x: Tensor) -> Tensor:
        """Input at the resolution of the output map. Shapes: x (N, in_channels, H, W) to (N, in_channels, H', W')."""
        top, left = self.border
        if top or left:
            x = x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]
        return x if self.stride == (1, 1) else average_pool(x, self.stride)

    def pool_for_attention(self, x: Tensor) -> Tensor:
        """Pool once more. Shapes: (N, in_channels, H', W') to (N, in_channels, ceil(H'/pool), ceil(W'/pool))."""
        pool = self.attention_pool
        return average_pool(x, (pool, pool)) if pool > 1 else x

    def attend(self, x: Tensor) -> Tensor:
        """MHA(x). Shapes: x (N, in_channels, h, w), as `pool_for_attention` gives it, to (N, value_channels, h, w)."""
        q, k, v = self.qkv(x).split([self.key_channels, self.key_channels, self.value_channels], dim=1)
        q, k, v = (t.unflatten(1, (self.heads, -1)).movedim(2, -1) for t in (q, k, v))  # N, heads, H, W, channels
        backend: Backend = "fused" if torch.jit.is_tracing() and self.backend == "auto" else self.backend
        out = attention(q, k, v, self.rel_height, self.rel_width, backend)
        return self.proj(out.movedim(-1, 2).flatten(1, 2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Resize tables that were made for another resolution to this layer's."""
        for name in ("rel_height", "rel_width"):
            table, own = state_dict.get(prefix + name), getattr(self, name)
            if table is not None and table.ndim == 2 and table.shape[0] % 2 and table.shape[1] == own.shape[1]:
                state_dict[prefix + name] = resize_table(table, (own.shape[0] + 1) // 2).contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"heads={self.heads}, key_channels={self.key_channels}, value_channels={self.value_channels}, "
            f"resolution={self.resolution}, attention_pool={self.attention_pool}"
        )


class Projection(nn.Conv2d):
    """W^O: a 1x1 convolution, computed as a matrix product on CPUs.

    On a CPU, with so few channels, torch's convolution takes three times as long, most of it set-up.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (N, value_channels, H, W) to the same."""
        if x.device.type != "cpu" or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return super().forward(x)
        out = (self.weight.flatten(1) @ x.flatten(2)).unflatten(2, x.shape[2:])
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    """Permute channels: channel c of the result is channel order[c] of x."""
    if torch.is_grad_enabled():
        return _Reorder.apply(x, order)
    return x.index_select(1, order)  # the call of a Function takes longer than this copy


class _Reorder(Function):
    """Permute channels. The gradient is gathered by the inverse order, which is faster than torch's scattered sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return _reorder(grad, order.argsort()), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (order,) = ctx.saved_tensors
        return tangent.index_select(1, order)


def _border(kernel_size: tuple[int, int], padding: tuple[int, int] | str, dilation: tuple[int, int]) -> tuple[int, int]:
    """Rows at the top and bottom, and columns at the left and right, of the input on which no window is centred."""
    if isinstance(padding, str):
        return (0, 0) if padding == "same" else _border(kernel_size, (0, 0), dilation)
    rows, columns = (d * (k - 1) // 2 - p for k, p, d in zip(kernel_size, padding, dilation, strict=True))
    if any(k % 2 == 0 for k in kernel_size) or min(rows, columns) < 0:
        raise ValueError(
            f"an attention-augmented convolution needs an odd kernel and at most dilation * (kernel - 1) / 2 padding; "
            f"got kernel {kernel_size}, padding {padding}, dilation {dilation}"
        )
    return rows, columns


def _check_split(out_channels: int, heads: int, key_channels: int, value_channels: int, attention_pool: int) -> None:
    for name, channels in (("key_channels", key_channels), ("value_channels", value_channels)):
        if heads < 1 or channels < 1 or channels % heads:
            raise ValueError(f"{name}={channels} is not a positive multiple of heads={heads}")
    if value_channels > out_channels:
        raise ValueError(f"value_channels={value_channels} is more than out_channels={out_channels}")
    if attention_pool < 1:
        raise ValueError(f"attention_pool={attention_pool} is less than 1")
