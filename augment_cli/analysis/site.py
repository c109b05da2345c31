"""A site: one convolution of a model, as a value."""

import math
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]
Kind = Literal["dense", "grouped", "depthwise"]


@dataclass(frozen=True, slots=True)
class ConvSite:
    """One convolution of a model. Sizes are (height, width); resolution is that of the output map."""

    name: str
    conv_class: str
    in_channels: int
    out_channels: int
    kernel_size: Size
    stride: Size
    padding: Size | str
    dilation: Size
    groups: int
    params: int
    in_resolution: Size
    resolution: Size
    calls: int
    stage: int
    block: str
    position: int  # in its block, among the convolutions of the same kernel size
    reads_image: bool
    stem: bool
    norm: str | None
    obstacle: str | None = None  # why nothing can replace it

    @property
    def positions(self) -> int:
        return math.prod(self.resolution)

    @property
    def kind(self) -> Kind:
        if self.groups == 1:
            return "dense"
        return "depthwise" if self.groups == self.in_channels else "grouped"

    def admits(self, reduction: int) -> bool:
        """Whether r input channels can share a map of AW: no share and no group straddles the other's border."""
        return reduction_fits(reduction, self.in_channels, self.groups)


def reduction_fits(reduction: int, in_channels: int, groups: int) -> bool:
    inputs = in_channels // groups
    return in_channels % reduction == 0 and (inputs % reduction == 0 or reduction % inputs == 0)
