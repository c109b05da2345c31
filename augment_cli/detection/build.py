"""Torchvision's detectors over a backbone of timm's, converted or plain."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from augment_cli.checkpoint.metadata import attach
from augment_cli.detection.pyramid import Body, Extra, Pyramid, channel_statistics, make_pyramid, open_body
from augment_cli.detection.settings import TWO_STAGES, Anchors, DetectorSettings, Kind, Norm, class_names
from augment_cli.errors import InputError, boundary, nearest
from augment_cli.planning.recipe import describe_errors
from augment_cli.seeds import seeded

Model = str | Path | nn.Module
Classes = int | Sequence[str]

CLASSES: dict[Kind, type] = {"retinanet": RetinaNet, "fcos": FCOS, "faster-rcnn": FasterRCNN, "mask-rcnn": MaskRCNN}

# Arguments of torchvision's classes that the settings have entries of their own for.
_OWN = ("num_classes", "min_size", "max_size")


def retinanet(model: Model, classes: Classes, **options: Any) -> RetinaNet:
    """RetinaNet: pyramid levels P3 to P7, nine anchors at each place. Arguments as of `detector`.

    Example:
        >>> found = retinanet("test_resnet", 3, norm="batch", min_size=64, levels=(1, 2, 3))
        >>> type(found).__name__, sorted(found.backbone.fpn._modules)
        ('RetinaNet', ['extra_blocks', 'inner_blocks', 'layer_blocks'])
    """
    return detector("retinanet", model, classes, **options)


def fcos(model: Model, classes: Classes, **options: Any) -> FCOS:
    """FCOS: pyramid levels P3 to P7, no anchors. Arguments as of `detector`."""
    return detector("fcos", model, classes, **options)


def faster_rcnn(model: Model, classes: Classes, **options: Any) -> FasterRCNN:
    """Faster R-CNN: pyramid levels P2 to P6, three anchors at each place. Arguments as of `detector`.

    As in torchvision, label 0 is the background: classes have the labels from 1.
    """
    return detector("faster-rcnn", model, classes, **options)


def mask_rcnn(model: Model, classes: Classes, **options: Any) -> MaskRCNN:
    """Mask R-CNN: Faster R-CNN with a mask for every box. Arguments as of `detector`."""
    return detector("mask-rcnn", model, classes, **options)


def detector(
    kind: Kind,
    model: Model,
    classes: Classes,
    *,
    levels: Sequence[int] | None = None,
    norm: Norm = "frozen",
    anchors: Anchors | None = None,
    channels: int = 256,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A plain detector of torchvision over a model's feature levels. `augment_cli.save` writes it to one file.

    Args:
        kind: retinanet, fcos, faster-rcnn or mask-rcnn.
        model: as of `backbone`.
        classes: their names, or how many there are, without a background.
        levels: timm's feature levels that the pyramid reads; None takes those with strides of 8, 16 and 32, and of 4
            for Faster and Mask R-CNN.
        norm: as of `backbone`.
        anchors: sizes and shapes of anchors; FCOS has none.
        channels: width of the pyramid.
        min_size, max_size: pixels of the shorter side, and the most of the longer one. Of several of `min_size`,
            training takes one at random for each image, and evaluation the last.
        pretrained, checkpoint: weights for a name, as in `augment_cli.convert`.
        seed: of random weights.
        options: other numbers that torchvision's class takes, such as score_thresh=0.1.

    Raises:
        AugmentError: no such model or levels, or a setting that the detector does not take.
    """
    strides = (4, 8, 16, 32) if kind in TWO_STAGES else (8, 16, 32)
    body = open_body(model, levels, strides, pretrained=pretrained, checkpoint=checkpoint, seed=seed)
    settings = make_settings(
        body,
        kind=kind,
        classes=class_names(classes),
        norm=norm,
        anchors=anchors,
        channels=channels,
        min_size=(min_size,) if isinstance(min_size, int) else tuple(min_size),
        max_size=max_size,
        options=options,
    )
    return assemble(settings, body, seed)


def make_settings(body: Body, **values: Any) -> DetectorSettings:
    """A detector's settings: the values, and what its body determines.

    Raises:
        AugmentError: a value that is not valid.
    """
    first = next(m for m in body.module.modules() if isinstance(m, nn.Conv2d))
    mean, std = channel_statistics(body.module, first.in_channels)
    own: dict[str, Any] = {"model": body.name, "model_args": body.args, "levels": body.levels, "mean": mean, "std": std}
    try:
        return DetectorSettings(**own, **values)
    except ValidationError as error:
        raise InputError(f"the detector's settings: {describe_errors(error, DetectorSettings)}") from error


def assemble(settings: DetectorSettings, body: Body, seed: int = 0) -> Any:
    """The detector of these settings over a body. Pyramid and heads are random, from the seed.

    Raises:
        AugmentError: torchvision does not take the settings.
    """
    extra: Extra = "pool" if settings.kind in TWO_STAGES else "p6p7"
    with seeded(seed, "detector"):
        pyramid = make_pyramid(body, settings.norm, settings.channels, extra)
        _check_options(settings)
        with boundary(f"{settings.kind} cannot be made"):
            model = _MAKERS[settings.kind](settings, pyramid, _common(settings))
    model.__dict__["augment_detector"] = settings
    if body.metadata is not None:
        attach(model, body.metadata)
    return model


def settings_of(model: nn.Module) -> DetectorSettings | None:
    """The settings that hang on a detector of `assemble`; None for any other module."""
    found = getattr(model, "augment_detector", None)
    return found if isinstance(found, DetectorSettings) else None


def _check_options(settings: DetectorSettings) -> None:
    """Refuse options that torchvision's class does not name: it ignores unknown ones."""
    cls = CLASSES[settings.kind]
    known = [
        name
        for name, parameter in inspect.signature(cls).parameters.items()
        if isinstance(parameter.default, (bool, int, float))
    ]
    if unknown := [name for name in dict(settings.options) if name not in known or name in _OWN]:
        raise InputError(f"{cls.__name__} of torchvision has no option {unknown[0]}{nearest(unknown[0], known)}")


def _common(settings: DetectorSettings) -> dict[str, Any]:
    sizes = {"min_size": settings.min_size, "max_size": settings.max_size}
    return {"image_mean": settings.mean, "image_std": settings.std, **sizes, **dict(settings.options)}


def _retinanet(settings: DetectorSettings, pyramid: Pyramid, common: dict[str, Any]) -> RetinaNet:
    return RetinaNet(pyramid, len(settings.classes), anchor_generator=_anchors(settings, scales=3, extra=2), **common)


def _fcos(settings: DetectorSettings, pyramid: Pyramid, common: dict[str, Any]) -> FCOS:
    # torchvision's one square anchor of a level is as large as the level's stride
    levels = len(settings.levels) + 2
    generator = AnchorGenerator(Anchors(base=8, scales=1).sizes(levels), ((1.0,),) * levels)
    return FCOS(pyramid, len(settings.classes), anchor_generator=generator, **common)


def _two_stages(
    make: Callable[..., FasterRCNN], settings: DetectorSettings, pyramid: Pyramid, common: dict[str, Any]
) -> FasterRCNN:
    generator = _anchors(settings, scales=1, extra=1)
    return make(pyramid, len(settings.classes) + 1, rpn_anchor_generator=generator, **common)


def _anchors(settings: DetectorSettings, scales: int, extra: int) -> AnchorGenerator:
    """Anchors for the levels of the pyramid and `extra` ones behind; `scales` where the settings have none."""
    anchors, levels = settings.anchors or Anchors(scales=scales), len(settings.levels) + extra
    return AnchorGenerator(anchors.sizes(levels), (anchors.ratios,) * levels)


_MAKERS: dict[Kind, Callable[[DetectorSettings, Pyramid, dict[str, Any]], Any]] = {
    "retinanet": _retinanet,
    "fcos": _fcos,
    "faster-rcnn": lambda *parts: _two_stages(FasterRCNN, *parts),
    "mask-rcnn": lambda *parts: _two_stages(MaskRCNN, *parts),
}
