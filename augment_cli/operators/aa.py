"""AA, attention augmentation: some output channels come from two-dimensional relative self-attention.

Paper: `Attention Augmented Convolutional Networks` (Bello, Zoph, Vaswani, Shlens, Le), arXiv 1904.09925.
Parameters: k k F_in (F_out - d_v) + F_in (2 d_k + d_v) + d_v^2 + (2 (H + W) - 2) d_k / heads. [arith]
Multiply-adds are those of convolutions and matrix products, as torch.utils.flop_counter counts them: pooling, softmax,
interpolation and element-wise work are left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from augment_cli.analysis.site import Convolution, ConvSite, Size, filter_macs, filter_params
from augment_cli.bounds import MOST_CHANNELS, MOST_HEADS, MOST_KEYS, MOST_LISTED, MOST_SIDE, Channels, Side
from augment_cli.operators.operator import Operator, Settings, Split, Table
from augment_cli.operators.registry import register

if TYPE_CHECKING:
    from torch import nn

LEGEND = "Keys and Values are attention's channels, Pool is how many times smaller its map is."
PAPER = "Attention Augmented Convolutional Networks, arXiv 1904.09925"

Stage = Annotated[int, Field(ge=0, le=MOST_LISTED)]

# How far from the written split a budget may look, in heads' worth of channels to either side. Close ones matter most:
# equal sites mix them; far ones are for budgets that ask for a lot.
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class AATable(Table):
    """[aa]: attention for some output channels."""

    heads: Annotated[int, Field(ge=1, le=MOST_HEADS, description="attention heads")] = 8
    key_ratio: Annotated[float, Field(gt=0, le=4, description="key channels / output channels (kappa)")] = 0.2
    value_ratio: Annotated[
        float, Field(gt=0, le=1, description="value channels / output channels (upsilon); 1 leaves no convolution")
    ] = 0.1
    min_key_channels: Annotated[int, Field(ge=1, le=MOST_KEYS, description="least key channels per head")] = 1
    narrow: Annotated[
        Literal["more-keys", "fewer-heads"], Field(description="what gives where key_ratio is under the least")
    ] = "fewer-heads"
    attention_pool: Annotated[
        int | Literal["auto"] | Annotated[dict[Stage, Side], Field(max_length=MOST_LISTED)],
        Field(description="attend on a map this many times smaller; auto: by map size; {2 = 4}: by stage, else 1"),
    ] = "auto"
    largest_attention_map: Annotated[
        int, Field(ge=1, le=MOST_SIDE**2, description="auto: pool maps of more positions (height x width) than this")
    ] = 1024
    max_attention_pool: Annotated[
        int, Field(ge=1, le=MOST_SIDE, description="auto: the largest pool, whatever the map")
    ] = 8

    @field_validator("attention_pool")
    @classmethod
    def _pool_is_in_range(cls, value: Any) -> Any:
        if isinstance(value, int) and not 1 <= value <= MOST_SIDE:
            raise ValueError(f"not from 1 to {MOST_SIDE}")
        return value


class AASettings(Settings):
    aa: AATable = AATable()


@dataclass(frozen=True, slots=True, order=True)
class AASplit(Split):
    """key_channels: d_k, value_channels: d_v, both over all heads. The attention's map is attention_pool x smaller."""

    heads: Channels
    key_channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS * MOST_KEYS)]
    value_channels: Channels
    attention_pool: Side = 1


@register
class AA(Operator[AASettings, AASplit]):
    name = "aa"
    title = "attention-augmented (AA)"
    papers = (PAPER,)
    legend = (LEGEND,)
    settings_type = AASettings
    split_type = AASplit
    fittable = True
    advice = "A larger aa.value_ratio, a smaller aa.key_ratio or aa.min_key_channels, or more sites would help"

    def obstacle(self, site: ConvSite) -> str | None:
        return attention_obstacle(site)

    def written(self, site: ConvSite, settings: AASettings) -> AASplit | None:
        return written_attention(site, settings.aa)

    def refusal(self, site: ConvSite, settings: AASettings) -> str:
        return too_narrow(site, settings.aa)

    def idle(self, site: Convolution, split: AASplit) -> str | None:
        return one_position(site, split)

    def check(self, site: Convolution, split: AASplit) -> None:
        check_attention(site, split, site.out_channels)

    def splits(self, site: ConvSite, settings: AASettings, written: AASplit) -> tuple[AASplit, ...]:
        keys, values = channels_around(site, settings.aa, written)
        return tuple(AASplit(written.heads, k, v, written.attention_pool) for k, v in sorted(product(keys, values)))

    def distance(self, site: ConvSite, split: AASplit, written: AASplit) -> float:
        return channel_distance(site, split, written)

    def distance_left(self, site: ConvSite, written: AASplit) -> float:
        return ratio_distance(site, (0, 0), written)

    def rank(self, split: AASplit) -> tuple[int, int]:
        return split.value_channels, split.key_channels

    def params(self, site: Convolution, split: AASplit) -> int:
        return filter_params(site, site.out_channels - split.value_channels) + attention_params(site, split)

    def macs(self, site: Convolution, split: AASplit) -> int:
        return filter_macs(site, site.out_channels - split.value_channels) + attention_macs(site, split)

    def given_up(self, split: AASplit) -> int:
        return split.value_channels

    def build(self, conv: "nn.Conv2d", site: Convolution, split: AASplit, kept: list[int]) -> "nn.Module":
        from augment_cli.operators.modules import augment, select_filters

        return augment(conv, select_filters(conv, kept), kept, **layer_settings(site, split))

    def added(self, module: "nn.Module") -> list[str]:
        return [name for name, _ in module.named_parameters() if not name.startswith("conv.")]

    def columns(self, split: AASplit) -> dict[str, str]:
        return attention_columns(split)

    def describe(self, split: AASplit) -> str:
        return describe_attention(split)

    def ratios(self, site: Convolution, split: AASplit) -> dict[str, float]:
        return channel_ratios(site, split)


def attention_obstacle(site: ConvSite) -> str | None:
    """Why attention cannot take over channels of this convolution under any settings; None where it can."""
    if site.kind == "depthwise":
        return "depthwise: every channel is a group of its own, and AA gives up channels of whole groups only"
    if any(k % 2 == 0 for k in site.kernel_size):
        return "even kernel: its windows have no centre to attend from"
    if isinstance(site.padding, tuple):
        widest = (d * (k - 1) // 2 for k, d in zip(site.kernel_size, site.dilation, strict=True))
        if any(p > most for p, most in zip(site.padding, widest, strict=True)):
            return "padded beyond its kernel: its border has no input to attend to"
    return None


def written_attention(site: ConvSite, table: AATable) -> AASplit | None:
    """The split that the ratios ask for; None where the site is too narrow for it."""
    heads = _heads(site, table)
    keys = max(_multiple(table.key_ratio * site.out_channels, heads), _least_keys(heads, table))
    least_values = 0 if table.narrow == "more-keys" or site.groups > 1 else heads
    values = max(_multiple(table.value_ratio * site.out_channels, value_step(site, heads)), least_values)
    return AASplit(heads, keys, values, attention_pool(site, table)) if values else None


def attention_pool(site: ConvSite, table: AATable) -> int:
    """The recipe's pool; for auto the smallest of 1, 2, 4, ... that brings the map within its number of positions."""
    if isinstance(table.attention_pool, dict):
        return table.attention_pool.get(site.stage, 1)
    if table.attention_pool != "auto":
        return table.attention_pool
    pools = [2**octave for octave in range(table.max_attention_pool.bit_length())]
    sizes = (math.prod(attention_size(site.resolution, pool)) for pool in pools)
    return next((p for p, size in zip(pools, sizes, strict=True) if size <= table.largest_attention_map), pools[-1])


def attention_size(resolution: Size, attention_pool: int) -> Size:
    """(height, width) of the map that the attention runs on."""
    height, width = (math.ceil(size / attention_pool) for size in resolution)
    return height, width


def value_step(site: Convolution, heads: int) -> int:
    """Value channels are a multiple of this: every head has as many, and every group gives up as many."""
    return heads if site.groups == 1 else math.lcm(heads, site.groups)


def too_narrow(site: ConvSite, table: AATable) -> str:
    """Why `written_attention` found no split."""
    if site.groups > 1:
        step = value_step(site, table.heads)
        return (
            f"grouped ({site.groups} groups): value channels come in multiples of {step}, so that groups and heads "
            f"stay whole, and value_ratio {table.value_ratio:g} of {site.out_channels} is less"
        )
    return (
        f"too few channels: value_ratio {table.value_ratio:g} of {site.out_channels} "
        f"gives {table.heads} heads no value channel each"
    )


def one_position(site: Convolution, split: AASplit) -> str | None:
    """Why attention is of no use on this map; None where it has more than one position to attend to."""
    if math.prod(attention_size(site.resolution, split.attention_pool)) > 1:
        return None
    pooled = f" pooled by {split.attention_pool}" if split.attention_pool > 1 else ""
    return f"one position: attention on a map of {'x'.join(map(str, site.resolution))}{pooled} can do nothing"


def check_attention(site: Convolution, split: AASplit, most_values: int) -> None:
    """Refuse a split whose channels do not go with its heads, the site's width or its groups.

    Raises:
        ValueError: names the numbers.
    """
    for key in ("key_channels", "value_channels"):
        channels = getattr(split, key)
        if channels % split.heads:
            raise ValueError(f"{key}={channels} is not a positive multiple of heads={split.heads}")
    if split.value_channels > most_values:
        raise ValueError(f"value_channels={split.value_channels} is more than {most_values}")
    most = 2 * MOST_KEYS * site.out_channels
    if split.key_channels > most:
        raise ValueError(f"key_channels={split.key_channels} is more than {most}")
    if split.value_channels % site.groups:
        raise ValueError(f"value_channels={split.value_channels} does not leave {site.groups} groups whole")


def channels_around(site: ConvSite, table: AATable, written: AASplit) -> tuple[list[int], list[int]]:
    """Admissible key and value channels near the written ones."""
    heads = written.heads
    most_keys = max(2 * written.key_channels, site.out_channels // heads * heads)
    most_values = site.out_channels if written.value_channels == site.out_channels else site.out_channels - 1
    step = value_step(site, heads)
    keys = _around(written.key_channels, heads, _least_keys(heads, table), most_keys)
    return keys, _around(written.value_channels, step, step, most_values)


def channel_distance(site: Convolution, split: AASplit, written: AASplit) -> float:
    """The squared changes of kappa and upsilon."""
    return ratio_distance(site, (split.key_channels, split.value_channels), written)


def ratio_distance(site: Convolution, channels: tuple[int, int], written: AASplit) -> float:
    """The same, for numbers of key and value channels; a convolution that is left as it is has none of either."""
    keys, values = channels
    kappa = (keys - written.key_channels) / site.out_channels
    upsilon = (values - written.value_channels) / site.out_channels
    return kappa**2 + upsilon**2


def attention_params(site: Convolution, split: AASplit) -> int:
    """Parameters of the attention: projections and relative tables."""
    height, width = attention_size(site.resolution, split.attention_pool)
    projections = site.in_channels * (2 * split.key_channels + split.value_channels) + split.value_channels**2
    return projections + (2 * (height + width) - 2) * split.key_channels // split.heads


def attention_macs(site: Convolution, split: AASplit) -> int:
    """Multiply-adds of the attention, of all calls for one image."""
    height, width = attention_size(site.resolution, split.attention_pool)
    keys, values, positions = split.key_channels, split.value_channels, height * width
    projections = site.in_channels * (2 * keys + values) + values**2
    pairs = positions * (keys + values) + (height + width) * keys  # content and values, then relative logits
    return site.calls * positions * (projections + pairs)


def layer_settings(site: Convolution, split: AASplit) -> dict[str, Any]:
    """Arguments of AAConv2d for its attention."""
    channels = {"key_channels": split.key_channels, "value_channels": split.value_channels}
    return {"heads": split.heads, **channels, "resolution": site.resolution, "attention_pool": split.attention_pool}


def attention_columns(split: AASplit) -> dict[str, str]:
    """Heads, channels and pool for a table."""
    columns = {"Heads": split.heads, "Keys": split.key_channels, "Values": split.value_channels}
    return {title: str(value) for title, value in {**columns, "Pool": split.attention_pool}.items()}


def describe_attention(split: AASplit) -> str:
    """Heads, channels and pool in words."""
    heads = f"{split.heads} head{'s' if split.heads > 1 else ''}"
    pool = f", pool {split.attention_pool}" if split.attention_pool > 1 else ""
    return f"{heads}, {split.key_channels} key and {split.value_channels} value channels{pool}"


def channel_ratios(site: Convolution, split: AASplit) -> dict[str, float]:
    """The attained kappa and upsilon."""
    return {"keys": split.key_channels / site.out_channels, "values": split.value_channels / site.out_channels}


def _heads(site: ConvSite, table: AATable) -> int:
    if table.narrow == "more-keys":
        return table.heads
    fitting: Iterable[int] = (
        heads
        for heads in range(table.heads, 0, -1)
        if table.heads % heads == 0
        and table.key_ratio * site.out_channels >= heads * table.min_key_channels
        and table.value_ratio * site.out_channels >= heads
    )
    return next(iter(fitting), 1)


def _least_keys(heads: int, table: AATable) -> int:
    """A layer too narrow even for one head of the recipe's least keeps its ratio, where fewer heads are what gives."""
    return 1 if heads == 1 and table.narrow == "fewer-heads" else heads * table.min_key_channels


def _multiple(value: float, of: int) -> int:
    """Rounded down to a multiple, float noise aside: 0.1 x 80 is 8."""
    return math.floor(value / of + 1e-9) * of


def _around(center: int, step: int, least: int, most: int) -> list[int]:
    steps = (0, *_STEPS, *(-s for s in _STEPS))
    return sorted({v for v in (center + step * s for s in steps) if least <= v <= most} | {center})
