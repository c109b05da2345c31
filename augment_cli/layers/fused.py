"""The attention core of AA as one call of a fused attention kernel: exact, memory O(HW (d + H + W)), made for GPUs.

Same function as `augment_cli.layers.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).

A relative logit depends on the query and on the row, or the column, of the key. So the H + W relative logits of a query
become H + W more channels of it, and a key gets as many that say which row and which column it is in:

    q.k + rows[y_k] + columns[x_k]  =  [q, rows, columns] . [k, onehot(y_k), onehot(x_k)]

with no bias tensor, which the fused kernels either do not take or would read as (HW)^2 numbers. One plain call, so
torch.compile and torch.export follow it, and vmap where the kernel has a rule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from augment_cli.layers.relative import relative_logits


def fused_relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other, by `scaled_dot_product_attention`.

    In half precision the relative logits are rounded to the type of the queries, as every channel is: an error of at
    most 2^-8 of their magnitude each in bfloat16, 2^-11 in float16, which the plain form has only where autocast or
    the inputs' type brings it. The sums are float32 inside the kernels. Derivatives of higher order and function
    transforms are what PyTorch has for the kernel that it picks.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    height, width, head_channels = q.shape[2:]
    q = q * head_channels**-0.5
    channels = _round_up(max(head_channels + height + width, v.shape[-1]))
    queries = _extended(channels, q, *relative_logits(q, rel_height, rel_width))
    keys = _extended(channels, k, *_position(k))
    out = F.scaled_dot_product_attention(queries, keys, _extended(channels, v), scale=1.0)
    return out[..., : v.shape[-1]].unflatten(2, (height, width)).to(v.dtype)


def _extended(channels: int, maps: Tensor, *more: Tensor) -> Tensor:
    """The channels of all, and zeros up to `channels`. Shapes: (N, heads, H, W, c_i) to (N, heads, HW, channels)."""
    missing = channels - sum(t.shape[-1] for t in (maps, *more))
    zeros = maps.new_zeros(1).expand(*maps.shape[:-1], missing)
    return torch.cat([maps, *(t.to(maps.dtype) for t in more), zeros], dim=-1).flatten(2, 3)


def _position(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Which row and which column each position is in, one-hot. Shapes: (N, heads, H, W, .) to (..., H) and (..., W)."""
    height, width = maps.shape[2:4]
    rows, columns = (torch.eye(size, dtype=maps.dtype, device=maps.device) for size in (height, width))
    shape = maps.shape[:-1]
    return rows.unsqueeze(1).expand(*shape, height), columns.expand(*shape, width)


def _round_up(channels: int, multiple: int = 8) -> int:
    """GPU kernels want head widths that are multiples of 8; some of them, and the one for CPUs, one width for all."""
    return -(-channels // multiple) * multiple
