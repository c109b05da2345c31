"""A site: one convolution of a model, as a value."""

import math
from dataclasses import dataclass

Size = tuple[int, int]


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
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels
