"""Images with boxes, augmented, in batches: lists of images and of targets, as torchvision's detectors take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from augment_cli import signals
from augment_cli.dataset import BadImage, Images
from augment_cli.detection.coco import Annotations, Record
from augment_cli.errors import FileError
from augment_cli.seeds import seed_cpu
from augment_cli.specs import OnCorrupt
from augment_cli.training.data import pins, place
from augment_cli.training.task import Batches
from augment_cli.training.transfer import aside

Target = dict[str, Tensor]


class DetectionImages(Images):
    """Images (3, H, W) in bytes, and targets: boxes (n, 4), labels (n,), image_id (), masks (n, H, W) if asked for.

    Augmentation flips and crops. Its random numbers depend on seed, epoch and index alone.
    """

    def __init__(
        self,
        annotations: Annotations,
        *,
        first_label: int = 0,
        masks: bool = False,
        flip: float = 0.0,
        crop_scale: float = 1.0,
        on_corrupt: OnCorrupt = "fail",
        seed: int = 0,
    ) -> None:
        super().__init__(annotations.records, None, channels=3, on_corrupt=on_corrupt, labels=False, seed=seed)
        self.annotations, self.first_label, self.masks = annotations, first_label, masks
        self.flip, self.crop_scale = flip, crop_scale

    def _name(self, place: int) -> str:
        return str(self.annotations.records[place].file)

    def _read(self, place: int) -> tuple[Image.Image, int]:
        with Image.open(self.annotations.records[place].file) as image:
            return image.convert(self.mode), place

    def _item(self, index: int) -> tuple[Any, Any]:
        picture, where = self._readable(index)
        record = self.annotations.records[where]
        image = pil_to_tensor(picture)
        target = make_target(record, self.first_label, self.masks)
        _check_size(record, image)
        seed_cpu(self.seed, "image", self.epoch, index)
        return augment(image, target, self.flip, self.crop_scale)


def _check_size(record: Record, image: Tensor) -> None:
    if tuple(image.shape[1:]) != (record.height, record.width):
        raise BadImage(
            f"{record.file} is {image.shape[2]} x {image.shape[1]} pixels large, and its annotations are for "
            f"{record.width} x {record.height}"
        )


def make_target(record: Record, first_label: int, masks: bool) -> Target:
    """What a detector is to find in an image: everything but crowds."""
    things = [thing for thing in record.things if not thing.crowd]
    target = {
        "boxes": torch.tensor([thing.box for thing in things], dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([thing.label + first_label for thing in things], dtype=torch.int64),
        "image_id": torch.tensor(record.id),
    }
    if masks:
        drawn = [draw_mask(record, thing.segmentation) for thing in things]
        target["masks"] = (
            torch.stack(drawn) if drawn else torch.zeros(0, record.height, record.width, dtype=torch.uint8)
        )
    return target


def draw_mask(record: Record, segmentation: Any) -> Tensor:
    """A mask (H, W) of zeros and ones from polygons or run lengths.

    Raises:
        AugmentError: there are none.
    """
    from pycocotools import mask

    if not segmentation:
        raise BadImage(f"{record.file} has a box without a segmentation, and Mask R-CNN learns from those")
    size = (record.height, record.width)
    if isinstance(segmentation, list):
        runs = mask.merge(mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation.get("counts"), list):
        runs = mask.frPyObjects(segmentation, *size)
    else:
        runs = segmentation
    return torch.from_numpy(mask.decode(runs))


def augment(image: Tensor, target: Target, flip: float, crop_scale: float) -> tuple[Tensor, Target]:
    """Crop and mirror an image with its boxes and masks, each at random.

    crop_scale: the smallest crop, as a share of the image's area; the crop has the image's proportions. A box stays,
    cut to the crop, where its centre is inside.
    """
    if crop_scale < 1:
        image, target = _crop(image, target, crop_scale)
    if torch.rand(()) < flip:
        image, target = _mirror(image, target)
    return image, target


def _crop(image: Tensor, target: Target, scale: float) -> tuple[Tensor, Target]:
    share, down, right = torch.rand(3).tolist()
    side = (scale + (1 - scale) * share) ** 0.5
    full = image.shape[-2:]
    height, width = (max(1, round(length * side)) for length in full)
    top, left = round(down * (full[0] - height)), round(right * (full[1] - width))
    window = (slice(top, top + height), slice(left, left + width))
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = torch.tensor([width, height])
    boxes = torch.minimum(boxes.clamp(min=0), size.repeat(2))
    kept = ((centres >= 0) & (centres < size)).all(1) & (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    found = {key: value[kept] for key, value in (target | {"boxes": boxes}).items() if key != "image_id"}
    if "masks" in found:
        found["masks"] = found["masks"][(slice(None), *window)].contiguous()
    return image[(slice(None), *window)].contiguous(), found | {"image_id": target["image_id"]}


def _mirror(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - target["boxes"][:, [2, 0]]
    mirrored = {"masks": target["masks"].flip(-1)} if "masks" in target else {}
    return image.flip(-1), target | {"boxes": boxes} | mirrored


@dataclass(frozen=True)
class Batch:
    """Images (3, H, W) in bytes, each of its own size, and their targets, as worker processes send them."""

    images: list[Tensor]
    targets: list[Target]

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, from which it is copied while the device computes. torch's loader calls it."""
        pinned: list[Target] = [{key: value.pin_memory() for key, value in target.items()} for target in self.targets]
        return Batch([image.pin_memory() for image in self.images], pinned)

    def to(self, device: torch.device, non_blocking: bool = True) -> tuple[list[Tensor], list[Target]]:
        """Images (3, H, W) from 0 to 1, and targets, on the device. accelerate calls it."""
        with aside(device) as used:
            images = [image.to(device, non_blocking=True).float().div_(255) for image in self.images]
            targets = [
                {key: value.to(device, non_blocking=True) for key, value in target.items()} for target in self.targets
            ]
            used += images
            used += [value for target in targets for value in target.values()]
        return images, targets


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    images, targets = zip(*samples, strict=True)
    return Batch(list(images), list(targets))


def _begin_worker(ending: signals.Flag, _: int) -> None:
    signals.ignore_in_worker(ending)


def make_loader(
    images: DetectionImages, batch_size: int, workers: int, accelerator: Accelerator, seed: int | None = None
) -> Batches:
    """This process's batches, on its device. With a seed they are shuffled, and the last, smaller one is left out."""
    loader: DataLoader = DataLoader(
        images,
        batch_size,
        shuffle=seed is not None,
        drop_last=seed is not None,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=partial(_begin_worker, signals.at_exit()),
        pin_memory=pins(accelerator),
        persistent_workers=workers > 0,
    )
    return place(loader, accelerator, seed=seed)


def check_same_categories(train: Annotations, val: Annotations) -> None:
    """Refuse splits whose categories differ.

    Raises:
        AugmentError: names the first that is in one file only.
    """
    a, b = (dict(zip(split.category_ids, split.classes, strict=True)) for split in (train, val))
    if a != b:
        id_ = min(id_ for id_ in a.keys() | b.keys() if a.get(id_) != b.get(id_))
        raise FileError(
            f"{train.file} and {val.file} do not have the same categories: {id_} is {a.get(id_, 'none')} in the one, "
            f"{b.get(id_, 'none')} in the other"
        )


def check_pycocotools(path: Path) -> None:
    """Refuse to begin without the package that computes average precision.

    Raises:
        AugmentError: it is not installed.
    """
    from importlib.util import find_spec

    if find_spec("pycocotools") is None:
        raise FileError(f"data {path}: pycocotools is not installed; pip install 'augment-cli[detection]'")
