"""Parameters and multiply-adds of a convolution site under a choice, in closed form.

Multiply-adds are those of one image, as torch.utils.flop_counter counts them (FLOPs = 2 x): convolutions and matrix
products. Pooling, softmax, interpolation, element-wise work and the forming of attended kernels are not counted.

AA (arXiv 1904.09925): parameters k k F_in (F_out - d_v) + F_in (2 d_k + d_v) + d_v^2 + (2 (H + W) - 2) d_k / heads.
[arith] AW (arXiv 2108.08205): C1 C1/r + (C1/r)^2 + C2 max(1, C1/groups/r) beside the kernel. [ours]
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from augment_cli.analysis.site import Size

Variant = Literal["aa", "aw", "aa+aw"]


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """What a site becomes. Zeros say "none": no value channels is no AA, no reduction is no AW."""

    heads: int = 0
    key_channels: int = 0
    value_channels: int = 0
    attention_pool: int = 1
    reduction: int = 0


PLAIN = Choice()


class Convolution(Protocol):
    """What a count needs to know of a convolution: a ConvSite of a model, or a SitePlan that was read from a file."""

    in_channels: int
    out_channels: int
    kernel_size: Size
    groups: int
    resolution: Size
    positions: int
    params: int
    calls: int


def params(site: Convolution, choice: Choice) -> int:
    """Parameters of the module at the site, biases and gains of the convolution included."""
    filters = site.out_channels - choice.value_channels
    total = site.params // site.out_channels * filters
    if choice.reduction:
        total += _kernel_attention(site, filters, choice.reduction)
    if choice.value_channels:
        height, width = attention_size(site.resolution, choice.attention_pool)
        total += site.in_channels * (2 * choice.key_channels + choice.value_channels) + choice.value_channels**2
        total += (2 * (height + width) - 2) * choice.key_channels // choice.heads
    return total


def macs(site: Convolution, choice: Choice) -> int:
    """Multiply-adds of all calls of the module at the site, for one image."""
    filters, taps = site.out_channels - choice.value_channels, math.prod(site.kernel_size)
    total = site.positions * taps * site.in_channels // site.groups * filters
    if choice.reduction and filters:
        total += taps * _kernel_attention(site, filters, choice.reduction)
    if choice.value_channels:
        height, width = attention_size(site.resolution, choice.attention_pool)
        keys, values, positions = choice.key_channels, choice.value_channels, height * width
        projections = site.in_channels * (2 * keys + values) + values**2
        pairs = positions * (keys + values) + (height + width) * keys  # content and values, then relative logits
        total += positions * (projections + pairs)
    return site.calls * total


def attention_size(resolution: Size, attention_pool: int) -> Size:
    """(height, width) of the map that the attention runs on."""
    return tuple(math.ceil(size / attention_pool) for size in resolution)


def _kernel_attention(site: Convolution, filters: int, reduction: int) -> int:
    hidden = site.in_channels // reduction
    maps = max(1, hidden // site.groups)  # of an output channel
    return (site.in_channels * hidden + hidden**2 + filters * maps) if filters else 0
