"""Softmax attention over the positions of a map, with 2-D relative positions.

AA (Bello et al., arXiv 1904.09925, section 3.2), for one head:
    O = softmax( (Q K^T + S_H + S_W) / sqrt(d) ) V
"""

from torch import Tensor

from augment_cli.layers.relative import relative_logits


def relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other, the logits materialised: O(heads (HW)^2) memory.

    The query is scaled by d^(-1/2) before both the content and the relative logits. [paper]

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    height, width, head_channels = q.shape[2:]
    q = q * head_channels**-0.5
    rows, columns = relative_logits(q, rel_height, rel_width)
    logits = q.flatten(2, 3) @ k.flatten(2, 3).transpose(-2, -1)  # N, heads, HW, HW
    logits = logits.unflatten(-1, (height, width))
    logits = logits + rows.flatten(2, 3).unsqueeze(-1) + columns.flatten(2, 3).unsqueeze(-2)
    weights = logits.flatten(-2).softmax(-1)
    return (weights.to(v.dtype) @ v.flatten(2, 3)).unflatten(2, (height, width))
