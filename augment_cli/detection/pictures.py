"""Pictures of images with their true boxes, and beside them with those that a detector found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from augment_cli.detection.coco import Record
from augment_cli.detection.precision import Found
from augment_cli.detection.settings import DetectorSettings
from augment_cli.reporting.style import picture

# Boxes with lower scores are not drawn: a detector returns a hundred boxes for every image.
_LEAST_SCORE = 0.3


def draw_examples(path: Path, records: Sequence[Record], found: Found, detector: DetectorSettings) -> None:
    """Write a picture with a row for each image: the truth at the left, at the right what was found."""
    with picture(path, 9, 4 * len(records), dpi=100) as figure:
        rows = figure.subplots(len(records), 2, squeeze=False)
        for (left, right), record in zip(rows, records, strict=True):
            with Image.open(record.file) as image:
                pixels = image.convert("RGB")
            truth = [(thing.box, detector.classes[thing.label]) for thing in record.things if not thing.crowd]
            entries = [entry for entry in found.get(record.id, []) if entry["score"] >= _LEAST_SCORE]
            guesses = [(e["box"], f"{detector.classes[e['label']]} {e['score']:.2f}") for e in entries]
            _draw(left, pixels, truth, f"{record.file.name}: truth")
            _draw(right, pixels, guesses, f"found, from a score of {_LEAST_SCORE:g} on")


def _draw(axes: Any, pixels: Image.Image, boxes: Sequence[tuple[Sequence[float], str]], title: str) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(pixels)
    axes.set_title(title, fontsize="small")
    axes.set_axis_off()
    for (left, top, right, bottom), name in boxes:
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="yellow", linewidth=1.5)
        )
        axes.text(left, top, name.replace("$", r"\$"), fontsize=7, color="black", backgroundcolor="yellow", va="bottom")
