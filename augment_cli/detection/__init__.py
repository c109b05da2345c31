"""Detection: torchvision's detectors over backbones of timm's, converted or plain, trained and evaluated on COCO data.

    from augment_cli import detection

    detector = detection.retinanet("resnet50-aa", classes=["cat", "dog"])

Importing this package is cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

from augment_cli.detection.settings import Anchors, DetectorSettings

if TYPE_CHECKING:
    from augment_cli.detection.build import detector, faster_rcnn, fcos, mask_rcnn, retinanet
    from augment_cli.detection.pyramid import backbone

_HOMES = {
    "backbone": "pyramid",
    "detector": "build",
    "faster_rcnn": "build",
    "fcos": "build",
    "mask_rcnn": "build",
    "retinanet": "build",
}

__all__ = [
    "Anchors",
    "DetectorSettings",
    "backbone",
    "detector",
    "faster_rcnn",
    "fcos",
    "mask_rcnn",
    "retinanet",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
