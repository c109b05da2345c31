"""AW, attention weights: the kernel itself is attended, for each sample.

Paper: `An Attention Module for Convolutional Neural Networks` (Zhu, Hofstee, Lee, Al-Ars), arXiv 2108.08205.
Parameters beside the kernel: C1 C1/r + (C1/r)^2 + C2 max(1, C1/groups/r). [ours]
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from augment_cli.analysis.site import Convolution, ConvSite, filter_macs, filter_params
from augment_cli.bounds import MOST_CHANNELS, Channels
from augment_cli.operators.operator import Operator, Settings, Split, Table
from augment_cli.operators.registry import register

if TYPE_CHECKING:
    from torch import nn

PAPER = "An Attention Module for Convolutional Neural Networks, arXiv 2108.08205"
READING = (
    "AW is our reading of its paper: the order of its operations and the residual are the paper's; widths, groups, "
    "reduction and how it joins AA are ours."
)
LEGEND = "r is the reduction, in our reading of AW."

# Convolution classes whose kernel AWConv2d can form.
_ATTENDABLE = ("Conv2d", "Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


class AWTable(Table):
    """[aw]: attended kernels."""

    reduction: Annotated[
        int, Field(ge=1, le=MOST_CHANNELS, description="r: input channels that share an attention map")
    ] = 16


class AWSettings(Settings):
    aw: AWTable = AWTable()


@dataclass(frozen=True, slots=True, order=True)
class AWSplit(Split):
    """reduction: r, input channels that share an attention map."""

    reduction: Channels


@register
class AW(Operator[AWSettings, AWSplit]):
    name = "aw"
    title = "attended kernels (our reading of AW)"
    papers = (PAPER,)
    reading = READING
    legend = (LEGEND,)
    settings_type = AWSettings
    split_type = AWSplit
    advice = "AW only adds parameters: a larger aw.reduction adds fewer, and operator aa+aw (recipe aa-aw) adds none"

    def obstacle(self, site: ConvSite) -> str | None:
        return kernel_obstacle(site)

    def written(self, site: ConvSite, settings: AWSettings) -> AWSplit:
        return AWSplit(fitting_reduction(site, settings.aw.reduction))

    def check(self, site: Convolution, split: AWSplit) -> None:
        check_reduction(site, split.reduction)

    def splits(self, site: ConvSite, settings: AWSettings, written: AWSplit) -> tuple[AWSplit, ...]:
        return tuple(AWSplit(r) for r in reductions_around(site, written.reduction))

    def distance(self, site: ConvSite, split: AWSplit, written: AWSplit) -> float:
        return reduction_distance(split.reduction, written.reduction)

    def distance_left(self, site: ConvSite, written: AWSplit) -> float:
        return left_distance(site, written.reduction)

    def rank(self, split: AWSplit) -> int:
        return -split.reduction

    def params(self, site: Convolution, split: AWSplit) -> int:
        return filter_params(site, site.out_channels) + added_params(site, site.out_channels, split.reduction)

    def macs(self, site: Convolution, split: AWSplit) -> int:
        return filter_macs(site, site.out_channels) + added_macs(site, site.out_channels, split.reduction)

    def build(self, conv: "nn.Conv2d", site: Convolution, split: AWSplit, kept: list[int]) -> "nn.Module":
        from augment_cli.operators.modules import attend_kernel

        return attend_kernel(conv, split.reduction)

    def added(self, module: "nn.Module") -> list[str]:
        return [name for name, _ in module.named_parameters() if is_added(name)]

    def columns(self, split: AWSplit) -> dict[str, str]:
        return {"r": str(split.reduction)}

    def describe(self, split: AWSplit) -> str:
        return f"attended kernel, reduction {split.reduction}"


def kernel_obstacle(site: ConvSite) -> str | None:
    """Why the kernel of this convolution cannot be attended; None where it can."""
    if site.conv_class not in _ATTENDABLE:
        return f"{site.conv_class} forms its kernel in a way that AW does not know"
    return None


def admits(site: Convolution, reduction: int) -> bool:
    """Whether r input channels can share a map: no share and no group straddles the other's border."""
    inputs = site.in_channels // site.groups
    return site.in_channels % reduction == 0 and (inputs % reduction == 0 or reduction % inputs == 0)


def check_reduction(site: Convolution, reduction: int) -> None:
    """Refuse a reduction that the site does not admit.

    Raises:
        ValueError: names both numbers.
    """
    if not admits(site, reduction):
        among = f" in {site.groups} groups" if site.groups > 1 else ""
        raise ValueError(f"reduction={reduction} does not divide in_channels={site.in_channels}{among}")


def fitting_reduction(site: Convolution, reduction: int) -> int:
    """The largest reduction up to the given one that the site admits."""
    return next(r for r in range(min(reduction, site.in_channels), 0, -1) if admits(site, r))


def reductions_around(site: Convolution, written: int) -> list[int]:
    """Admissible reductions within a factor of 2 below and 4 above the written one."""
    return sorted({r for r in (written // 2, written, written * 2, written * 4) if r and admits(site, r)})


def reduction_distance(reduction: int, written: int) -> float:
    """A tenth of an octave counts as much as 1% of the output channels; squared. [ours]"""
    return (0.1 * math.log2(reduction / written)) ** 2


def left_distance(site: Convolution, written: int) -> float:
    """To a kernel that is not attended: an octave beyond one map for all input channels. [ours]"""
    return reduction_distance(2 * site.in_channels, written)


def added_params(site: Convolution, filters: int, reduction: int) -> int:
    """Parameters that attending the kernel of `filters` filters adds."""
    hidden = site.in_channels // reduction
    maps = max(1, hidden // site.groups)  # of an output channel
    return (site.in_channels * hidden + hidden**2 + filters * maps) if filters else 0


def added_macs(site: Convolution, filters: int, reduction: int) -> int:
    """Multiply-adds that attending the kernel adds: each of its parameters is used once a tap and call."""
    return site.calls * math.prod(site.kernel_size) * added_params(site, filters, reduction)


def is_added(name: str) -> bool:
    """Whether a parameter of AWConv2d is none of its source's."""
    return name.partition(".")[0] not in ("weight", "bias", "standardize")
