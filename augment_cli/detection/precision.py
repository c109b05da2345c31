"""Average precision of a detector on COCO's format, by pycocotools."""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from augment_cli.detection.coco import Annotations
from augment_cli.errors import InputError
from augment_cli.training.task import Batches

Found = dict[int, list[dict[str, Any]]]
"""Predictions by image id; each has a box (left, top, right, bottom), a label from 0, a score and perhaps a mask."""


@dataclass(frozen=True)
class Precision:
    """Average precision in percent: over intersections over union from 0.5 to 0.95, at 0.5, at 0.75, and of objects of
    under 32x32, up to 96x96 and more pixels. None where there is no object of a size or class.
    """

    ap: float
    ap50: float
    ap75: float
    small: float | None
    medium: float | None
    large: float | None
    classes: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        named = {"AP": self.ap, "AP50": self.ap50, "AP75": self.ap75}
        return {**named, "AP small": self.small, "AP medium": self.medium, "AP large": self.large}


@torch.inference_mode()
def predict(model: nn.Module, batches: Batches, accelerator: Accelerator, first_label: int) -> Found:
    """A detector's predictions on every image, from all processes together. Every module gets its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    found: Found = {}
    for images, targets in batches:
        with accelerator.autocast():
            outputs = model(list(images))
        for target, output in zip(targets, outputs, strict=True):
            found[int(target["image_id"])] = _predictions(output, first_label)
    for module, mode in modes:
        module.training = mode
    return {image: entries for part in gather_object([found]) for image, entries in part.items()}


def _predictions(output: dict[str, Tensor], first_label: int) -> list[dict[str, Any]]:
    boxes, scores = output["boxes"].float().tolist(), output["scores"].float().tolist()
    labels = (output["labels"] - first_label).tolist()
    entries = [{"box": b, "label": c, "score": s} for b, c, s in zip(boxes, labels, scores, strict=True)]
    if "masks" in output:
        for entry, mask in zip(entries, (output["masks"][:, 0] > 0.5).cpu().numpy(), strict=True):
            entry["mask"] = _encode(mask)
    return entries


def _encode(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as runs

    encoded: dict[str, Any] = runs.encode(np.asfortranarray(mask.astype(np.uint8)))
    return encoded


def average_precision(annotations: Annotations, found: Found, kind: str = "bbox") -> Precision:
    """Average precision of predictions.

    Args:
        kind: "bbox" compares boxes, "segm" masks.

    Raises:
        AugmentError: there is nothing to find.
    """
    from pycocotools.cocoeval import COCOeval

    if not annotations.things:
        raise InputError(f"{annotations.file} has no boxes: there is nothing to find")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth, results = _truth(annotations), _results(annotations, found, kind)
        judged = COCOeval(truth, truth.loadRes(results) if results else _empty(truth), kind)
        judged.evaluate()
        judged.accumulate()
    return _scores(judged.eval["precision"], annotations)


def _scores(precision: np.ndarray, annotations: Annotations) -> Precision:
    """From COCOeval's table (10 overlaps, 101 recalls, classes, 4 sizes, 3 limits), -1 where there is no object."""
    table = precision[..., -1]

    def mean(part: np.ndarray) -> float | None:
        known = part[part > -1]
        return 100 * float(known.mean()) if known.size else None

    per_class = {name: mean(table[:, :, index, 0]) for index, name in enumerate(annotations.classes)}
    overall, at_50, at_75 = (mean(part) or 0.0 for part in (table[..., 0], table[0, ..., 0], table[5, ..., 0]))
    small, medium, large = (mean(table[..., size]) for size in (1, 2, 3))
    return Precision(overall, at_50, at_75, small, medium, large, per_class)


def _truth(annotations: Annotations) -> Any:
    from pycocotools.coco import COCO

    images = [{"id": r.id, "width": r.width, "height": r.height} for r in annotations.records]
    things = [(record, thing) for record in annotations.records for thing in record.things]
    entries = [
        {
            "id": number + 1,
            "image_id": record.id,
            "category_id": annotations.category_ids[thing.label],
            "bbox": _corner_and_size(thing.box),
            "area": thing.area,
            "iscrowd": int(thing.crowd),
            "segmentation": thing.segmentation or [],
        }
        for number, (record, thing) in enumerate(things)
    ]
    pairs = zip(annotations.category_ids, annotations.classes, strict=True)
    truth = COCO()
    truth.dataset = {
        "images": images,
        "annotations": entries,
        "categories": [{"id": id_, "name": name} for id_, name in pairs],
    }
    truth.createIndex()
    return truth


def _empty(truth: Any) -> Any:
    """Results without a prediction, which pycocotools does not load."""
    from pycocotools.coco import COCO

    results = COCO()
    results.dataset = {**truth.dataset, "annotations": []}
    results.createIndex()
    return results


def _results(annotations: Annotations, found: Found, kind: str) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image,
            "category_id": annotations.category_ids[entry["label"]],
            "score": entry["score"],
            **({"segmentation": entry["mask"]} if kind == "segm" else {"bbox": _corner_and_size(entry["box"])}),
        }
        for image, entries in sorted(found.items())
        for entry in entries
    ]


def _corner_and_size(box: tuple[float, ...] | list[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]
