"""A detector's settings: one frozen object, saved with its weights. Imports nothing heavy."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from augment_cli.analysis.arguments import Arguments
from augment_cli.bounds import MOST_LISTED, MOST_SIDE, Channels, Name, Side

Kind = Literal["retinanet", "fcos", "faster-rcnn", "mask-rcnn"]
Norm = Literal["frozen", "batch"]

TWO_STAGES = ("faster-rcnn", "mask-rcnn")

# Torchvision's detectors name as many by default as COCO has categories; Objects365 and LVIS have 365 and 1,203.
_MOST_CLASSES = 2**14

_Ratio = Annotated[float, Field(gt=0, le=100)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Anchors(_Frozen):
    """Anchor boxes of every pyramid level: `scales` sizes an octave and all ratios (height / width) of each.

    base: side in pixels of the smallest square anchor on the first level; it doubles from level to level.
    """

    base: Annotated[int, Field(ge=1, le=MOST_SIDE)] = 32
    scales: Annotated[int, Field(ge=1, le=16)] = 3
    ratios: Annotated[tuple[_Ratio, ...], Field(min_length=1, max_length=16)] = (0.5, 1.0, 2.0)

    def sizes(self, levels: int) -> tuple[tuple[int, ...], ...]:
        """Sides in pixels, for each of so many levels."""
        octaves = (self.base * 2**level for level in range(levels))
        return tuple(tuple(int(side * 2 ** (i / self.scales)) for i in range(self.scales)) for side in octaves)


class DetectorSettings(_Frozen):
    """Everything that makes a detector again, but the weights and the plan of its backbone.

    model, model_args: the backbone in timm's registry. levels: timm's feature levels that the pyramid reads. norm:
    batch statistics of the backbone, kept ("frozen") or those of each batch in training ("batch"). classes: names, in
    the order of the labels; category_ids: their ids in the COCO file that they come from, if there is one. min_size:
    sides in pixels to which the shorter side of a training image is resized, one of them at random; the last is that of
    evaluation. max_size: most pixels of the longer side. mean, std: of an image's channels, whose values are from 0 to
    1. options: other arguments of torchvision's class, numbers.
    """

    schema_number: Annotated[Literal[1], Field(alias="schema")] = 1
    kind: Kind
    model: Name
    model_args: Arguments = ()
    levels: Annotated[tuple[Annotated[int, Field(ge=0, le=MOST_LISTED)], ...], Field(min_length=1, max_length=10)]
    norm: Norm = "frozen"
    classes: Annotated[tuple[Name, ...], Field(min_length=1, max_length=_MOST_CLASSES)]
    category_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=2**53)], ...], Field(max_length=_MOST_CLASSES)] = ()
    channels: Channels = 256
    anchors: Anchors | None = None
    min_size: Annotated[tuple[Side, ...], Field(min_length=1, max_length=MOST_LISTED)] = (800,)
    max_size: Side = 1333
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=4)] = (0.485, 0.456, 0.406)
    std: Annotated[tuple[_Ratio, ...], Field(min_length=1, max_length=4)] = (0.229, 0.224, 0.225)
    options: Arguments = ()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="after")
    def _agrees(self) -> "DetectorSettings":
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels={list(self.levels)} are not in rising order")
        if self.category_ids and len(self.category_ids) != len(self.classes):
            raise ValueError(f"{len(self.category_ids)} category_ids for {len(self.classes)} classes")
        if self.anchors is not None and self.kind == "fcos":
            raise ValueError("FCOS has no anchors: leave them out")
        if ":" in self.model:  # hf-hub:... and local-dir:... make timm read other files, or the network
            raise ValueError(f"{self.model!r} is not in timm's registry")
        return self

    @property
    def first_label(self) -> int:
        """Label of the first class: two-stage detectors of torchvision keep 0 for the background."""
        return 1 if self.kind in TWO_STAGES else 0

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True)


def class_names(classes: int | Sequence[str]) -> tuple[str, ...]:
    """Names of classes; a number stands for so many without names."""
    return tuple(str(i) for i in range(classes)) if isinstance(classes, int) else tuple(classes)
