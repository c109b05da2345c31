"""A site: one convolution of a model, as a value."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from augment_cli.bounds import MOST_CONVOLUTIONS, MOST_SIDE, Channels, CountOfChannels, Name, Side, Total

Size = tuple[int, int]
Kind = Literal["dense", "grouped", "depthwise"]

# Fields of a site that was read from a file are held against these bounds.
_Pair = tuple[Side, Side]
_MapSize = tuple[Annotated[int, Field(ge=0, le=MOST_SIDE)], Annotated[int, Field(ge=0, le=MOST_SIDE)]]
_Place = Annotated[int, Field(ge=0, le=MOST_CONVOLUTIONS)]


@dataclass(frozen=True, slots=True)
class ConvSite:
    """One convolution of a model. Sizes are (height, width); resolution is the size of the output map."""

    name: Name
    conv_class: Name
    in_channels: Channels
    out_channels: Channels
    kernel_size: _Pair
    stride: _Pair
    padding: tuple[CountOfChannels, CountOfChannels] | Name
    dilation: _Pair
    groups: Channels
    params: Total
    in_resolution: _MapSize
    resolution: _MapSize
    calls: _Place
    stage: _Place
    block: Name
    block_index: _Place  # its place in its block, among the convolutions of the same kernel size
    reads_image: bool
    stem: bool
    pyramid: bool  # in a feature pyramid, behind the backbone
    norm: Name | None
    obstacle: Name | None = None  # why nothing can replace it

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
