"""Brute-force references of the layers: explicit loops over the papers' formulas, float64, slow on purpose.

`weights` is a layer's state dict; everything else is a plain number, a pair of them, or "same".
"""

import math

import torch
from torch import Tensor


def pair(value) -> tuple:
    return value if isinstance(value, tuple) else (value, value)


def zeros_around(size: int, kernel: int, stride: int, dilation: int, padding) -> tuple[int, int]:
    """Zeros before and after one axis; "same" is TensorFlow's: ceil(size / stride) outputs, the odd zero at the end."""
    if padding != "same":
        return padding, padding
    total = max((math.ceil(size / stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def conv(x: Tensor, kernels, bias, stride, padding, dilation) -> Tensor:
    """O[n, :, y, x] = bias + sum over taps (i, j) of kernels[n][:, :, i, j] I[n, :, y s + i d - p, x s + j d - p]."""
    samples, _, height, width = x.shape
    out_channels, _, *kernel = kernels[0].shape
    (sy, sx), (dy, dx), (py, px) = pair(stride), pair(dilation), pair(padding)
    top, bottom = zeros_around(height, kernel[0], sy, dy, py)
    left, right = zeros_around(width, kernel[1], sx, dx, px)
    rows = (height + top + bottom - dy * (kernel[0] - 1) - 1) // sy + 1
    columns = (width + left + right - dx * (kernel[1] - 1) - 1) // sx + 1
    out = torch.zeros(samples, out_channels, rows, columns, dtype=x.dtype)
    for n in range(samples):
        for row in range(rows):
            for column in range(columns):
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        y, z = row * sy + i * dy - top, column * sx + j * dx - left
                        if 0 <= y < height and 0 <= z < width:
                            out[n, :, row, column] += (kernels[n][:, :, i, j] * x[n, :, y, z]).sum(1)
                if bias is not None:
                    out[n, :, row, column] += bias
    return out


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution: one matrix at every position."""
    return conv(x, [weight] * len(x), bias, 1, 0, 1)


def average_pool(x: Tensor, stride) -> Tensor:
    """3x3 means around every stride-th position, over those of the nine that are inside the map."""
    height, width = x.shape[-2:]
    sy, sx = pair(stride)
    out = torch.zeros(*x.shape[:2], math.ceil(height / sy), math.ceil(width / sx), dtype=x.dtype)
    for row in range(out.shape[2]):
        for column in range(out.shape[3]):
            near = [(row * sy + i, column * sx + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            inside = [(y, z) for y, z in near if 0 <= y < height and 0 <= z < width]
            out[:, :, row, column] = sum(x[:, :, y, z] for y, z in inside) / len(inside)
    return out


def adaptive_pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cell i of h is the mean over [floor(i H / h), ceil((i + 1) H / h))."""
    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    spans = [
        [range(math.floor(i * have / want), math.ceil((i + 1) * have / want)) for i in range(want)]
        for have, want in zip(x.shape[-2:], size, strict=True)
    ]
    for i, rows in enumerate(spans[0]):
        for j, columns in enumerate(spans[1]):
            cells = [x[:, :, y, z] for y in rows for z in columns]
            out[:, :, i, j] = sum(cells) / len(cells)
    return out


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixel centres meet (align_corners=False): position i of `want` is (i + 1/2) have / want - 1/2 in the source."""

    def neighbours(i: int, have: int, want: int) -> list[tuple[int, float]]:
        position = max((i + 0.5) * have / want - 0.5, 0.0)
        low = min(math.floor(position), have - 1)
        return [(low, 1 - (position - low)), (min(low + 1, have - 1), position - low)]

    out = torch.zeros(*x.shape[:2], *size, dtype=x.dtype)
    for row in range(size[0]):
        for column in range(size[1]):
            for y, a in neighbours(row, x.shape[2], size[0]):
                for z, b in neighbours(column, x.shape[3], size[1]):
                    out[:, :, row, column] += a * b * x[:, :, y, z]
    return out


def resized(table: Tensor, size: int) -> Tensor:
    """Linear over the offsets: the first and last rows stay first and last; a single row is the one of offset 0."""
    have, want = len(table), 2 * size - 1
    rows = []
    for i in range(want):
        position = i * (have - 1) / (want - 1) if want > 1 else (have - 1) / 2
        low = min(math.floor(position), have - 1)
        high = min(low + 1, have - 1)
        rows.append((1 - (position - low)) * table[low] + (position - low) * table[high])
    return torch.stack(rows)


def attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """softmax((Q K^T + S_H + S_W) / sqrt(d)) V of one head: maps (d, H, W) and (e, H, W) to (e, H, W).

    S_H[i, j] = q_i . r^H[y_j - y_i], row H - 1 of the table being offset 0; S_W alike.
    """
    channels, height, width = q.shape
    r_height, r_width = resized(rel_height, height), resized(rel_width, width)
    positions = [(y, x) for y in range(height) for x in range(width)]
    out = torch.zeros_like(v)
    for yi, xi in positions:
        query = q[:, yi, xi]
        logits = []
        for yj, xj in positions:
            content = float((query * k[:, yj, xj]).sum())
            s_height = float((query * r_height[yj - yi + height - 1]).sum())
            s_width = float((query * r_width[xj - xi + width - 1]).sum())
            logits.append((content + s_height + s_width) / math.sqrt(channels))
        powers = [math.exp(logit - max(logits)) for logit in logits]
        for (yj, xj), power in zip(positions, powers, strict=True):
            out[:, yi, xi] += power / sum(powers) * v[:, yj, xj]
    return out


def multi_head_attention(x: Tensor, weights: dict, heads: int) -> Tensor:
    """Concat[O_1 .. O_heads] W^O; the 1x1 convolution gives q, then k, then v, each of them head after head."""
    values = len(weights["proj.weight"])
    keys = (len(weights["qkv.weight"]) - values) // 2
    qkv = pointwise(x, weights["qkv.weight"], weights.get("qkv.bias"))
    out = torch.zeros(len(x), values, *x.shape[-2:], dtype=x.dtype)
    d, e = keys // heads, values // heads
    for n in range(len(x)):
        for head in range(heads):
            q = qkv[n, head * d : (head + 1) * d]
            k = qkv[n, keys + head * d : keys + (head + 1) * d]
            v = qkv[n, 2 * keys + head * e : 2 * keys + (head + 1) * e]
            tables = weights["rel_height"], weights["rel_width"]
            out[n, head * e : (head + 1) * e] = attention(q, k, v, *tables)
    return pointwise(out, weights["proj.weight"], weights.get("proj.bias"))


def aa_conv(
    x: Tensor, weights: dict, *, kernel, heads, stride=1, padding=0, dilation=1, groups=1, attention_pool=1
) -> Tensor:
    """Concat[Conv(X), MHA(X)]; with "channel_order" among the weights, output c is channel channel_order[c] of it."""
    seen = x
    if padding != "same":
        border = [d * (k - 1) // 2 - p for k, p, d in zip(pair(kernel), pair(padding), pair(dilation), strict=True)]
        seen = seen[:, :, border[0] : x.shape[2] - border[0], border[1] : x.shape[3] - border[1]]
    if pair(stride) != (1, 1):
        seen = average_pool(seen, stride)
    size = seen.shape[-2:]
    if attention_pool > 1:
        seen = average_pool(seen, attention_pool)
    parts = [bilinear(multi_head_attention(seen, weights, heads), size)]
    if "conv.weight" in weights:
        kernels = [block_diagonal(weights["conv.weight"], groups)] * len(x)
        parts.insert(0, conv(x, kernels, weights.get("conv.bias"), stride, padding, dilation))
    out = torch.cat(parts, dim=1)
    order = weights.get("channel_order", range(out.shape[1]))
    return torch.stack([out[:, int(c)] for c in order], dim=1)


def block_diagonal(kernel: Tensor, groups: int) -> Tensor:
    """(C2, C1/groups, h, w) to the dense kernel (C2, C1, h, w) that computes the same."""
    out_channels, inputs, *size = kernel.shape
    dense = torch.zeros(out_channels, inputs * groups, *size, dtype=kernel.dtype)
    for c2 in range(out_channels):
        start = c2 // (out_channels // groups) * inputs
        dense[c2, start : start + inputs] = kernel[c2]
    return dense


def aw_map(x: Tensor, weights: dict, reduction: int, groups: int = 1) -> Tensor:
    """A (N, C2, C1, h, w): pool -> reduce, ReLU -> mix, ReLU -> expand in groups -> every map to `r` input channels.

    Where the kernel has no entries, A stays zero: a map is expanded for those output channels only that meet it.
    """
    out_channels, inputs, *kernel = weights["weight"].shape
    in_channels, outputs = inputs * groups, out_channels // groups
    r = max(
        d
        for d in range(1, min(in_channels, reduction) + 1)
        if in_channels % d == 0 and (inputs % d == 0 or d % inputs == 0)
    )
    a0 = adaptive_pool(x, tuple(kernel))
    a1 = pointwise(a0, weights["reduce.weight"]).clamp(min=0)
    a2 = pointwise(a1, weights["mix.weight"]).clamp(min=0)
    out = torch.zeros(len(x), out_channels, in_channels, *kernel, dtype=x.dtype)
    expand = iter(weights["expand.weight"].flatten())
    for g in range(in_channels // r):
        for c2 in range(out_channels):
            met = [c1 for c1 in range(g * r, (g + 1) * r) if c1 // inputs == c2 // outputs]
            s = next(expand) if met else 0
            for c1 in met:
                out[:, c2, c1] = s * a2[:, g]
    assert next(expand, None) is None
    return out


def aw_conv(x: Tensor, weights: dict, *, reduction, stride=1, padding=0, dilation=1, groups=1, kernel=None) -> Tensor:
    """O = conv(I, K + A (x) K), with K the layer's weight or `kernel`."""
    kernel = block_diagonal(weights["weight"] if kernel is None else kernel, groups)
    kernels = [kernel + a * kernel for a in aw_map(x, weights, reduction, groups)]
    return conv(x, kernels, weights.get("bias"), stride, padding, dilation)


def standardized(kernel: Tensor, eps: float, gain: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Every filter minus its mean, over the root of its biased variance plus eps; times gain and scale."""
    out = torch.zeros_like(kernel)
    for c2, weights in enumerate(kernel):
        mean = weights.sum() / weights.numel()
        variance = ((weights - mean) ** 2).sum() / weights.numel()
        factor = scale if gain is None else scale * gain[c2, 0, 0, 0]
        out[c2] = (weights - mean) / (variance + eps) ** 0.5 * factor
    return out
