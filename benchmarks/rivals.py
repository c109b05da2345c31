"""Other ways to compute AA's attention, as backends of AAConv2d: `timm`, `sdpa` and `flex`.

Shapes of all: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
"""

from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from timm.layers.bottleneck_attn import PosEmbedRel
from torch import Tensor

from augment_cli.layers.aa.attention import BACKENDS
from augment_cli.layers.aa.relative import relative_logits


def bottleneck_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attend as timm.layers.BottleneckAttn does between its qkv convolution and its pooling, scale_pos_embed=True."""
    heads, height, width, d = q.shape[1:]
    position = SimpleNamespace(height=height, width=width, height_rel=rel_height, width_rel=rel_width)
    q, v = (t.movedim(-1, 2).flatten(3).flatten(0, 1).transpose(1, 2) for t in (q, v))
    k = k.movedim(-1, 2).flatten(3).flatten(0, 1)
    logits = (q @ k + PosEmbedRel.forward(position, q)) * d**-0.5
    out = (logits.softmax(dim=-1) @ v).transpose(1, 2)
    return out.unflatten(0, (-1, heads)).unflatten(-1, (height, width)).movedim(2, -1)


def attention_with_bias(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """scaled_dot_product_attention with every relative logit in memory, as its bias."""
    height, width, d = q.shape[2:]
    rows, columns = relative_logits(q * d**-0.5, rel_height, rel_width)
    bias = (rows.flatten(2, 3).unsqueeze(-1) + columns.flatten(2, 3).unsqueeze(-2)).flatten(-2).to(q.dtype)
    queries, keys, values = (_widened(t, -(-t.shape[-1] // 8) * 8) for t in (q, k, v))
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=d**-0.5)
    return out[..., : v.shape[-1]].unflatten(2, (height, width))


def flex_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """torch's FlexAttention: the relative logits by row and by column are in memory, and added to each score."""
    height, width, d = q.shape[2:]
    rows, columns = (t.flatten(2, 3) for t in relative_logits(q * d**-0.5, rel_height, rel_width))

    def relative(score: Tensor, n: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[n, head, query, key // width] + columns[n, head, query, key % width]

    queries, keys, values = (_widened(t, max(16, 1 << (t.shape[-1] - 1).bit_length())) for t in (q, k, v))
    out = _flex(q.device.type)(queries, keys, values, score_mod=relative, scale=d**-0.5)
    return out[..., : v.shape[-1]].unflatten(2, (height, width))


@cache
def _flex(device: str):
    """FlexAttention, compiled where it is made for: uncompiled it has every score in memory."""
    from torch.nn.attention import flex_attention as module

    return torch.compile(module.flex_attention, dynamic=False) if device == "cuda" else module.flex_attention


def _widened(maps: Tensor, channels: int) -> Tensor:
    """Zeros behind the channels. Shapes: (N, heads, H, W, c) to (N, heads, HW, channels)."""
    return F.pad(maps.flatten(2, 3), (0, channels - maps.shape[-1]))


RIVALS = {"timm": bottleneck_attention, "sdpa": attention_with_bias, "flex": flex_attention}
BACKENDS.update(RIVALS)
