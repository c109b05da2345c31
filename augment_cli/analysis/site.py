"""A site: one convolution of a model, as a value."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

Size = tuple[int, int]
Kind = Literal["dense", "grouped", "depthwise"]


@dataclass(frozen=True, slots=True)
class ConvSite:
    """One convolution of a model. Sizes are (height, width); resolution is the size of the output map."""

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
    block_index: int  # its place in its block, among the convolutions of the same kernel size
    reads_image: bool
    stem: bool
    pyramid: bool  # in a feature pyramid, behind the backbone
    norm: str | None
    obstacle: str | None = None  # why nothing can replace it

    @property
    def positions(self) -> int:
        """Positions of the output map."""
        return math.prod(self.resolution)

    @property
    def kind(self) -> Kind:
        if self.groups == 1:
            return "dense"
        return "depthwise" if self.groups == self.in_channels else "grouped"


class Convolution(Protocol):
    """A convolution as counts know it: a ConvSite of a model, or a site of a plan that was read from a file.

    `params` are the source's, biases and gains included; `calls` are those of a forward pass.
    """

    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def kernel_size(self) -> Size: ...
    @property
    def groups(self) -> int: ...
    @property
    def resolution(self) -> Size: ...
    @property
    def positions(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def calls(self) -> int: ...


def filter_params(site: Convolution, filters: int) -> int:
    """Parameters of some of a convolution's filters, with their biases and gains."""
    return site.params // site.out_channels * filters


def filter_macs(site: Convolution, filters: int) -> int:
    """Multiply-adds of some of a convolution's filters, of all calls for one image."""
    taps = math.prod(site.kernel_size)
    return site.calls * site.positions * taps * site.in_channels // site.groups * filters
