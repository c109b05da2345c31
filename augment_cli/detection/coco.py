"""Annotations in COCO's format: read, checked, and with what had to be left out counted. Imports no torch."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from augment_cli.errors import FileError, InputError
from augment_cli.files import read_text

_SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "test")}
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# COCO's own file of 118,000 images has 448 MB.
_LARGEST_FILE = 2**33


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its box (left, top, right, bottom) in pixels, its class, and whether it stands for a crowd."""

    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool = False
    segmentation: Any = None


@dataclass(frozen=True, slots=True)
class Record:
    """One image with its objects; none make it a negative, which is trained on as well."""

    id: int
    file: Path
    width: int
    height: int
    things: tuple[Thing, ...] = ()


@dataclass(frozen=True)
class Annotations:
    """The images of a split. `classes` and `category_ids` are in the order of labels, from 0: by rising id.

    left_out: what was passed over or mended, in words, with how often.
    """

    file: Path
    records: tuple[Record, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def things(self) -> int:
        """Objects that are no crowds."""
        return sum(not thing.crowd for record in self.records for thing in record.things)


def read_annotations(folder: Path, split: str) -> Annotations:
    """A split's annotations. The file is `annotations/*SPLIT*.json`, `SPLIT.json` or `SPLIT/_annotations.coco.json`.

    Boxes are clipped to the image. Boxes without area, and annotations of images that are not listed, are left out and
    counted. Images without annotations stay.

    Raises:
        AugmentError: no such folder or file, not COCO's format, or image files that are not there.
    """
    file = _find(folder, split)
    data = _parse(file)
    categories = _categories(data, file)
    place = _image_folder(folder, file, split, data["images"])
    images = {}
    for entry in data["images"]:
        image = _image(entry, place, file)
        if image.id in images:
            raise FileError(f"{file}: two images have the id {image.id}")
        images[image.id] = image
    ids = sorted(categories)
    labels = {id_: label for label, id_ in enumerate(ids)}
    left_out: Counter[str] = Counter()
    things: dict[int, list[Thing]] = {image: [] for image in images}
    for entry in data["annotations"]:
        found = _thing(entry, images, labels, left_out, file)
        if found is not None:
            things[entry["image_id"]].append(found)
    records = tuple(
        Record(image.id, image.file, image.width, image.height, tuple(things[image.id])) for image in images.values()
    )
    _check_files(records, file)
    return Annotations(file, records, tuple(categories[id_] for id_ in ids), tuple(ids), left_out)


def check_folder(folder: Path, split: str) -> None:
    """Refuse a folder without annotations for a split, before they are read.

    Raises:
        AugmentError: says where annotations are looked for.
    """
    _find(folder, split)


def _names(split: str) -> tuple[str, ...]:
    return next((names for names in _SPLITS.values() if split in names), (split,))


def _find(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise InputError(f"data {folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    for name in _names(split):
        candidates = [*sorted(folder.glob(f"annotations/*{name}*.json")), folder / f"{name}.json"]
        candidates = [*candidates, folder / name / "_annotations.coco.json"]
        instances = [file for file in candidates if file.name.startswith("instances_")]
        if found := next((file for file in [*instances, *candidates] if file.is_file()), None):
            return found
    classes = [path for part in ("", *_names(split)) for path in sorted((folder / part).glob("*/*.*"))]
    if any(path.suffix.lower() in _IMAGES for path in classes):
        raise InputError(
            f"data {folder} has images in folders, as classification has them, and no annotations: `augment finetune` "
            f"trains on those; detection takes annotations/instances_{_names(split)[0]}*.json"
        )
    raise InputError(
        f"data {folder} has no annotations for the split {split}: annotations/instances_{_names(split)[0]}*.json, "
        f"{split}.json or {_names(split)[0]}/_annotations.coco.json"
    )


def _parse(file: Path) -> dict[str, Any]:
    text = read_text(file, "annotations", _LARGEST_FILE)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{file} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise FileError(f"{file} is not in COCO's format: it has no list {key!r}")
        if not all(isinstance(entry, dict) for entry in data[key]):
            raise FileError(f"{file} is not in COCO's format: {key!r} holds something that is no object")
    if not data["images"]:
        raise FileError(f"{file} lists no images")
    if not data["categories"]:
        raise FileError(f"{file} lists no categories")
    return data


def _categories(data: dict[str, Any], file: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in data["categories"]:
        id_ = _number(entry, "id", f"a category of {file}", whole=True)
        if id_ in found:
            raise FileError(f"{file}: two categories have the id {id_}")
        found[int(id_)] = str(entry.get("name", id_))
    return found


def _image(entry: dict[str, Any], place: Path, file: Path) -> Record:
    what = f"an image of {file}"
    name = entry.get("file_name")
    if not isinstance(name, str):
        raise FileError(f"{what} has no file_name")
    id_, width, height = (_number(entry, key, f"{what}, {name},", whole=True) for key in ("id", "width", "height"))
    if min(width, height) < 1:
        raise FileError(f"{what}, {name}, is {width} x {height} pixels large")
    return Record(int(id_), place / name, int(width), int(height))


def _thing(
    entry: dict[str, Any], images: dict[int, Record], labels: dict[int, int], left_out: Counter[str], file: Path
) -> Thing | None:
    """An annotation's object; None where there is nothing to train on, which is counted."""
    what = f"annotation {entry.get('id')} of {file}"
    image, category = (int(_number(entry, key, what, whole=True)) for key in ("image_id", "category_id"))
    if image not in images:
        left_out["annotations of images that are not listed"] += 1
        return None
    if category not in labels:
        raise FileError(f"{what} has the category {category}, which is not listed")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(side) for side in box):
        raise FileError(f"{what} has no bbox of four numbers")
    left, top, width, height = box
    clipped = _clip((left, top, left + width, top + height), images[image])
    if not (clipped[2] > clipped[0] and clipped[3] > clipped[1]):
        left_out["boxes outside their image or without area"] += 1
        return None
    if max(abs(a - b) for a, b in zip(clipped, (left, top, left + width, top + height), strict=True)) > 1:
        left_out["boxes clipped to their image"] += 1
    own = entry.get("area")
    area = float(own) if own is not None and _is_finite(own) else (clipped[2] - clipped[0]) * (clipped[3] - clipped[1])
    return Thing(clipped, labels[category], area, bool(entry.get("iscrowd", 0)), entry.get("segmentation"))


def _clip(box: tuple[float, float, float, float], image: Record) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(side) for side in box)
    return max(left, 0.0), max(top, 0.0), min(right, float(image.width)), min(bottom, float(image.height))


def _number(entry: dict[str, Any], key: str, what: str, whole: bool = False) -> int | float:
    value: Any = entry.get(key)
    if not _is_finite(value) or (whole and int(value) != value):
        raise FileError(f"{what} has no {key} that is a number")
    found: int | float = value
    return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _image_folder(folder: Path, file: Path, split: str, images: list[dict[str, Any]]) -> Path:
    """The folder in which the first image is; the likeliest one if it is in none."""
    places = list(_places(folder, file, split))
    first = str(images[0].get("file_name"))
    return next((place for place in places if (place / first).is_file()), places[0])


def _places(folder: Path, file: Path, split: str) -> Iterator[Path]:
    named = file.stem.removeprefix("instances_")
    if file.name == "_annotations.coco.json":
        yield file.parent
    for name in (named, *_names(split)):
        yield folder / name
        yield folder / "images" / name
    yield folder / "images"
    yield folder


def _check_files(records: tuple[Record, ...], file: Path) -> None:
    missing = [record.file for record in records if not record.file.is_file()]
    if missing:
        raise FileError(
            f"{file} lists {len(records):,} images, and {len(missing):,} of them are not there, such as {missing[0]}"
        )
