"""The attention core of AA as one call of torch's fused attention: exact, O(HW (d + H + W)) memory, made for GPUs.

Same function as `augment_cli.layers.aa.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).

A relative logit depends on the query and on the key's row or column only. So each query gets its H + W relative logits
as additional channels, and each key gets H + W channels that are one-hot in its row and its column:

    q.k + rows[y_k] + columns[x_k]  =  [q, rows, columns] . [k, onehot(y_k), onehot(x_k)]

This needs no bias tensor, which fused kernels either reject or read as (HW)^2 numbers. It is one plain call, which
torch.compile and torch.export can follow, and vmap too where torch's kernel has a rule.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from augment_cli.layers.aa.relative import relative_logits


def fused_relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other, by `scaled_dot_product_attention`.

    In half precision the relative logits are rounded to the dtype of the queries: a relative error of at most 2^-8 in
    bfloat16 and 2^-11 in float16. The reference rounds them only where autocast or the inputs' dtype does. Sums are
    float32 inside the kernels. Higher derivatives and function transforms work as far as torch's chosen kernel has
    them.

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
    """Concatenate channels and pad with zeros. Shapes: (N, heads, H, W, c_i) to (N, heads, HW, channels)."""
    missing = channels - sum(t.shape[-1] for t in (maps, *more))
    zeros = maps.new_zeros(1).expand(*maps.shape[:-1], missing)
    return torch.cat([maps, *(t.to(maps.dtype) for t in more), zeros], dim=-1).flatten(2, 3)


def _position(maps: Tensor) -> tuple[Tensor, Tensor]:
    """One-hot row and column of each position. Shapes: (N, heads, H, W, .) to (..., H) and (..., W)."""
    height, width = maps.shape[2:4]
    rows, columns = (torch.eye(size, dtype=maps.dtype, device=maps.device) for size in (height, width))
    shape = maps.shape[:-1]
    return rows.unsqueeze(1).expand(*shape, height), columns.expand(*shape, width)


def _round_up(channels: int, multiple: int = 8) -> int:
    """Width of a head for the fused kernels: a multiple of 8 for GPUs. Some take one width for q, k and v only."""
    return -(-channels // multiple) * multiple
