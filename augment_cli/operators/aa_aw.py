"""AA+AW: attention for some output channels, attended kernels for the filters of the others. [ours]

What attention saves in parameters pays for the attended kernels.
"""

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from pydantic import model_validator

from augment_cli.analysis.site import Convolution, ConvSite, filter_macs, filter_params
from augment_cli.bounds import Channels
from augment_cli.operators import aa, aw
from augment_cli.operators.aa import AATable
from augment_cli.operators.aw import AWTable
from augment_cli.operators.operator import Operator, Settings
from augment_cli.operators.registry import register

if TYPE_CHECKING:
    from torch import nn


class AAAWSettings(Settings):
    aa: AATable = AATable()
    aw: AWTable = AWTable()

    @model_validator(mode="after")
    def _leaves_a_kernel(self) -> "AAAWSettings":
        if self.aa.value_ratio == 1:
            raise ValueError("aa+aw attends the kernel of the convolution branch, and aa.value_ratio=1 leaves none")
        return self


@dataclass(frozen=True, slots=True, order=True)
class AAAWSplit(aa.AASplit):
    """As of AA, and `reduction`, r of AW; at least one filter stays."""

    reduction: Channels = 16


@register
class AAAW(Operator[AAAWSettings, AAAWSplit]):
    name = "aa+aw"
    title = "attention-augmented (AA) with attended kernels (our reading of AW)"
    papers = (aa.PAPER, aw.PAPER)
    reading = aw.READING
    legend = (aa.LEGEND, aw.LEGEND)
    settings_type = AAAWSettings
    split_type = AAAWSplit
    fittable = True
    advice = aa.AA.advice

    def obstacle(self, site: ConvSite) -> str | None:
        return aa.attention_obstacle(site) or aw.kernel_obstacle(site)

    def written(self, site: ConvSite, settings: AAAWSettings) -> AAAWSplit | None:
        attention = aa.written_attention(site, settings.aa)
        if attention is None or attention.value_channels == site.out_channels:
            return None
        return _with(attention, aw.fitting_reduction(site, settings.aw.reduction))

    def refusal(self, site: ConvSite, settings: AAAWSettings) -> str:
        return aa.too_narrow(site, settings.aa)

    def idle(self, site: Convolution, split: AAAWSplit) -> str | None:
        return aa.one_position(site, split)

    def check(self, site: Convolution, split: AAAWSplit) -> None:
        aa.check_attention(site, split, site.out_channels - 1)
        aw.check_reduction(site, split.reduction)

    def splits(self, site: ConvSite, settings: AAAWSettings, written: AAAWSplit) -> tuple[AAAWSplit, ...]:
        """The reduction bends with the value channels only: the whole product would be slow to search and offers hardly
        another count."""
        keys, values = aa.channels_around(site, settings.aa, written)
        found = {(k, v, written.reduction) for k, v in product(keys, values)}
        reductions = aw.reductions_around(site, written.reduction)
        found |= {(written.key_channels, v, r) for v, r in product(values, reductions)}
        return tuple(AAAWSplit(written.heads, k, v, written.attention_pool, r) for k, v, r in sorted(found))

    def distance(self, site: ConvSite, split: AAAWSplit, written: AAAWSplit) -> float:
        channels = aa.channel_distance(site, split, written)
        return channels + aw.reduction_distance(split.reduction, written.reduction)

    def distance_left(self, site: ConvSite, written: AAAWSplit) -> float:
        return aa.ratio_distance(site, (0, 0), written) + aw.left_distance(site, written.reduction)

    def rank(self, split: AAAWSplit) -> tuple[int, int, int]:
        return split.value_channels, split.key_channels, -split.reduction

    def params(self, site: Convolution, split: AAAWSplit) -> int:
        filters = site.out_channels - split.value_channels
        kernel = filter_params(site, filters) + aw.added_params(site, filters, split.reduction)
        return kernel + aa.attention_params(site, split)

    def macs(self, site: Convolution, split: AAAWSplit) -> int:
        filters = site.out_channels - split.value_channels
        kernel = filter_macs(site, filters) + aw.added_macs(site, filters, split.reduction)
        return kernel + aa.attention_macs(site, split)

    def given_up(self, split: AAAWSplit) -> int:
        return split.value_channels

    def build(self, conv: "nn.Conv2d", site: Convolution, split: AAAWSplit, kept: list[int]) -> "nn.Module":
        from augment_cli.operators.modules import attend_kernel, augment, select_filters

        branch = attend_kernel(select_filters(conv, kept), split.reduction)
        return augment(conv, branch, kept, **aa.layer_settings(site, split))

    def added(self, module: "nn.Module") -> list[str]:
        names = (name for name, _ in module.named_parameters())
        return [n for n in names if not n.startswith("conv.") or aw.is_added(n.removeprefix("conv."))]

    def columns(self, split: AAAWSplit) -> dict[str, str]:
        return aa.attention_columns(split) | {"r": str(split.reduction)}

    def describe(self, split: AAAWSplit) -> str:
        return f"{aa.describe_attention(split)}, attended kernel, reduction {split.reduction}"

    def ratios(self, site: Convolution, split: AAAWSplit) -> dict[str, float]:
        return aa.channel_ratios(site, split)


def _with(attention: aa.AASplit, reduction: int) -> AAAWSplit:
    channels = attention.heads, attention.key_channels, attention.value_channels, attention.attention_pool
    return AAAWSplit(*channels, reduction)
