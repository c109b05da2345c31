"""SE, squeeze-and-excitation, as an operator: each output channel of a convolution is scaled by a gate.

The gates come from the means of all output channels (Hu et al., arXiv 1709.01507). They start at 1, so that a converted
model computes what its source computes.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from augment_cli.analysis.site import Convolution, ConvSite, filter_macs, filter_params
from augment_cli.operators import Operator, Settings, Split, Table, register


class SqueezeTable(Table):
    """[se]: gates for output channels."""

    reduction: Annotated[int, Field(ge=1, le=1024, description="output channels / hidden channels of the gates")] = 16


class SqueezeSettings(Settings):
    se: SqueezeTable = SqueezeTable()


@dataclass(frozen=True, slots=True, order=True)
class SqueezeSplit(Split):
    """hidden: channels between the means and the gates."""

    hidden: Annotated[int, Field(ge=1, le=2**16)]


class SqueezedConv2d(nn.Module):
    """A convolution, its output multiplied by 2 sigmoid(expand(relu(reduce(mean over positions))))."""

    def __init__(self, conv: nn.Conv2d, hidden: int) -> None:
        super().__init__()
        place = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.conv = conv
        self.reduce = nn.Conv2d(conv.out_channels, hidden, 1, **place)
        self.expand = nn.Conv2d(hidden, conv.out_channels, 1, **place)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        out = self.conv(x)
        gates = self.expand(torch.relu(self.reduce(out.mean((2, 3), keepdim=True))))
        return out * (2 * torch.sigmoid(gates))


@register
class Squeeze(Operator[SqueezeSettings, SqueezeSplit]):
    name = "se"
    title = "convolutions with gated output channels (SE)"
    papers = ("Squeeze-and-Excitation Networks, arXiv 1709.01507",)
    settings_type = SqueezeSettings
    split_type = SqueezeSplit
    advice = "A larger se.reduction adds fewer parameters"

    def written(self, site: ConvSite, settings: SqueezeSettings) -> SqueezeSplit:
        return SqueezeSplit(max(1, site.out_channels // settings.se.reduction))

    def splits(self, site: ConvSite, settings: SqueezeSettings, written: SqueezeSplit) -> tuple[SqueezeSplit, ...]:
        return tuple(SqueezeSplit(hidden) for hidden in range(1, 2 * written.hidden + 1))

    def distance(self, site: ConvSite, split: SqueezeSplit, written: SqueezeSplit) -> float:
        return ((split.hidden - written.hidden) / site.out_channels) ** 2

    def rank(self, split: SqueezeSplit) -> int:
        return split.hidden

    def params(self, site: Convolution, split: SqueezeSplit) -> int:
        gates = 2 * site.out_channels * split.hidden + split.hidden + site.out_channels
        return filter_params(site, site.out_channels) + gates

    def macs(self, site: Convolution, split: SqueezeSplit) -> int:
        gates = site.calls * 2 * site.out_channels * split.hidden
        return filter_macs(site, site.out_channels) + gates

    def build(self, conv: nn.Conv2d, site: Convolution, split: SqueezeSplit, kept: list[int]) -> nn.Module:
        return SqueezedConv2d(conv, split.hidden)

    def added(self, module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters() if not name.startswith("conv.")]
