"""The settings of a run of `augment detect finetune`: one frozen object. Imports nothing heavy."""

from dataclasses import dataclass
from typing import ClassVar

from augment_cli.detection.settings import Kind, Norm
from augment_cli.errors import InputError
from augment_cli.training.settings import RunSettings

STEP = 32
"""Sides of training images are multiples of it, the stride of a ResNet's last stage."""


@dataclass(frozen=True)
class DetectionSettings(RunSettings):
    """A detection run's settings. The rates are ours; none has been tuned on COCO.

    detector: None takes that of MODEL's file. norm: None keeps the statistics of weights that were trained, and uses
    those of each batch for random ones. img_size: pixels of the shorter side, and the most of the longer one. scales:
    training resizes the shorter side to a multiple of 32 from so much of it to so much, at random for each image.
    """

    detector: Kind | None = None
    levels: tuple[int, ...] | None = None
    norm: Norm | None = None
    channels: int = 256
    anchor_base: int | None = None
    anchor_scales: int | None = None
    anchor_ratios: tuple[float, ...] | None = None
    img_size: tuple[int, int] = (800, 1333)

    # Augmentation.
    scales: tuple[float, float] = (0.8, 1.2)
    crop_scale: float = 1.0
    flip: float = 0.5

    epochs: int = 12
    batch_size: int = 4
    lr: float = 1e-3
    lr_carried: float = 0.1
    lr_fitted: float = 1.0

    fixed: ClassVar[tuple[str, ...]] = (
        *RunSettings.fixed,
        *(
            "detector",
            "levels",
            "norm",
            "channels",
            "anchor_base",
            "anchor_scales",
            "anchor_ratios",
            "img_size",
            "scales",
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.scales
        if not 0.1 <= low <= high <= 4:
            raise InputError(f"`scales={self.scales}`: two numbers from 0.1 to 4, the smaller first")
        if not 1 <= self.channels <= 2**12:
            raise InputError(f"`channels={self.channels}` is not from 1 to {2**12}")
        if self.img_size[0] > self.img_size[1]:
            raise InputError(f"`img_size={self.img_size}`: the most of the longer side is less than the shorter side")

    def min_sizes(self) -> tuple[int, ...]:
        """Sides that training draws from; the last, that of evaluation, is one of them."""
        side = self.img_size[0]
        low, high = (round(side * scale / STEP) for scale in self.scales)
        drawn = {STEP * i for i in range(max(low, 1), high + 1)} - {side}
        return (*sorted(drawn), side)
