"""A model as planning knows it: values alone, without torch."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from augment_cli.analysis.site import ConvSite
from augment_cli.bounds import MOST_CONVOLUTIONS, Channels, Name, Side, Total

Base = Literal["timm", "other"]


@dataclass(frozen=True)
class Source:
    """A model's name, what it is created with, and the images it is converted for.

    base: "timm" for a name in timm's registry; "other" for `package.module:function`, or an object's class, which
    only the user can make again. input_size: (channels, height, width).
    """

    name: Name
    args: dict[str, Any]
    input_size: tuple[Channels, Side, Side]
    base: Base = "timm"


@dataclass(frozen=True)
class Analysis:
    """The convolutions of a model in the order in which they are first called, and its counts.

    `params` counts every parameter once; `macs` are the multiply-adds of one image, by torch.utils.flop_counter.
    """

    input_size: tuple[Channels, Side, Side]
    sites: Annotated[tuple[ConvSite, ...], Field(max_length=MOST_CONVOLUTIONS)] = field(repr=False)
    params: Total
    macs: Total
