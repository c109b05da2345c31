"""Patterns into a layer: queries and relative tables under which every head sees its pattern.

Keys are zero where it matters, so that logits are relative alone: S_H[i, j] = q_i . r^H[y_j - y_i], and S_W likewise.
Logits L (heads, offsets of both tables) that are the logarithms of patterns are factored L = Q R by their singular
values: rows of R fill the tables, which the heads share, and head h asks with q_i = s_i Q_h. The scale s_i = u . x_i
is as near to 1 as a linear function of the input can be, which has no bias; inputs behind a ReLU have means to make it
from. Key channels beyond the rank of L keep what they were initialised with, and queries of zero: they add
nothing until they are trained.
"""

import torch
from torch import Tensor

from augment_cli.layers import AAConv2d

# How much logits fall at most from one offset to the next: beside an edge of the map, where a tap is missing, its
# nearest neighbour takes its place.
_STEEPEST = 5.0
_LOWEST = -20.0


def install_patterns(layer: AAConv2d, patterns: Tensor, window: tuple[int, int], step: tuple[int, int], scale: Tensor):
    """Set a layer's queries, keys and tables.

    Args:
        patterns: (heads, taps), non-negative.
        window: taps as (rows, columns), `step` (rows, columns) positions apart.
        scale: u, (in_channels,).
    """
    taps = patterns.unflatten(1, window)
    rows = [_logits(p, step[0], len(layer.rel_height)) for p in taps.sum(2)]
    columns = [_logits(p, step[1], len(layer.rel_width)) for p in taps.sum(1)]
    u, s, v = torch.linalg.svd(torch.cat([torch.stack(rows), torch.stack(columns)], dim=1), full_matrices=False)
    head_channels = layer.key_channels // layer.heads
    rank = min(head_channels, len(s))
    ask, tables = u[:, :rank] * s[:rank].sqrt(), v[:rank].T * s[:rank].sqrt()
    with torch.no_grad():
        query, key, _ = layer.qkv.weight.split([layer.key_channels, layer.key_channels, layer.value_channels])
        query.zero_()
        # The layer divides by the root of the head's channels.
        asked = ask.unsqueeze(2) * scale * head_channels**0.5
        query.view(layer.heads, head_channels, -1)[:, :rank] = asked.to(query)
        key.view(layer.heads, head_channels, -1)[:, :rank] = 0
        layer.rel_height[:, :rank] = tables[: len(layer.rel_height)].to(layer.rel_height)
        layer.rel_width[:, :rank] = tables[len(layer.rel_height) :].to(layer.rel_width)


def _logits(weights: Tensor, step: int, count: int) -> Tensor:
    """Logarithms of a line of taps, for all `count` offsets of a table: falling off between and beyond the taps."""
    middle, size = count // 2, len(weights)
    places = (torch.arange(size, dtype=torch.float64) - size // 2) * step
    heights = (weights / weights.max()).clamp_min(1e-30).log()
    offsets = torch.arange(-middle, middle + 1, dtype=torch.float64)
    distance = (offsets.unsqueeze(1) - places).abs()  # offsets, taps
    return (heights - _STEEPEST * distance).amax(1).clamp_min(_LOWEST)


def constant_direction(features: Tensor) -> Tensor:
    """The u whose u . x is nearest to 1 on average over positions. Shapes: (positions, channels) to (channels,)."""
    x = features.double()
    moments, mean = x.T @ x / len(x), x.mean(0)
    ridge = 1e-3 * moments.diagonal().mean().clamp_min(1e-12)
    u = torch.linalg.solve(moments + ridge * torch.eye(len(mean), dtype=x.dtype), mean)
    return u / (u @ mean).clamp_min(0.05)
