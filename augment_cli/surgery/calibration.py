"""Calibration images, and how near a converted model is to its source on those that no fit has seen."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from augment_cli.analysis.graph import count_classes
from augment_cli.dataset import ImageStream, open_dataset
from augment_cli.errors import InputError, boundary
from augment_cli.surgery.records import Fidelity

FEWEST = 20
LESS_MEMORY = "fewer `calibrate_images` or a smaller `input_size`"
_BATCH = 32


@dataclass(frozen=True)
class Calibration:
    """Images (N, C, H, W), the last fifth held out of fits: bytes, to be normalised, or floats as they are."""

    images: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str = ""

    @property
    def held(self) -> int:
        return len(self.images) // 5

    def fitting(self) -> Iterator[Tensor]:
        """Batches of images to fit on, (n, C, H, W) in single precision."""
        return self._batches(self.images[: len(self.images) - self.held])

    def held_out(self) -> Iterator[Tensor]:
        """Batches of images to measure on."""
        return self._batches(self.images[len(self.images) - self.held :])

    def all(self) -> Iterator[Tensor]:
        """Batches of every image, for models that no fit on them has changed."""
        return self._batches(self.images)

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        if images.is_floating_point():
            yield from images.split(_BATCH)
            return
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        for batch in images.split(_BATCH):
            yield (batch.float() / 255 - mean) / std


def load_images(
    spec: str, model: nn.Module, input_size: tuple[int, int, int], count: int = 512, seed: int = 0
) -> Calibration:
    """Images of a data set through timm's evaluation transform for a model.

    Args:
        spec: a folder of images, with or without class folders, or whatever `open_dataset` takes.
        input_size: (channels, height, width).
        count: how many images at most, drawn with the seed; a stream gives its first.

    Raises:
        AugmentError: nothing there, or too few images.
    """
    if count < FEWEST:
        raise InputError(f"`calibrate_images={count}`: give {FEWEST} at least; a few hundred are better")
    data = open_dataset(spec, labels=False, on_corrupt="skip", channels=input_size[0], seed=seed)
    data.transform, mean, std = eval_transform(model, input_size)
    images = list(_drawn(data, count, seed))
    _check_enough(len(images), spec)
    return Calibration(torch.stack(images), mean, std, spec)


def gather_images(
    images: Any, model: nn.Module, input_size: tuple[int, int, int], count: int = 512, seed: int = 0
) -> Calibration:
    """Calibration images from whatever holds them.

    Args:
        images: a spec or path as for `load_images`; a tensor (N, C, H, W), of bytes or of floats as the model takes
            them; or a torch data set or other iterable of such images (C, H, W) or PIL images, alone or before a label.
        model, input_size, count, seed: as for `load_images`.

    Raises:
        AugmentError: none of these, too few images, or images of another size than the model's.
    """
    if isinstance(images, (str, Path)):
        return load_images(str(images), model, input_size, count, seed)
    transform, mean, std = eval_transform(model, input_size)
    if isinstance(images, Tensor):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        stacked = images[order]
    else:
        with boundary("`calibrate`"):
            items = (item[0] if isinstance(item, (tuple, list)) else item for item in islice(images, count))
            tensors = [item if isinstance(item, Tensor) else transform(item) for item in items]
            _check_enough(len(tensors), "`calibrate`")
            stacked = torch.stack(tensors)
    if tuple(stacked.shape[1:]) != input_size:
        size, wanted = ("x".join(map(str, shape)) for shape in (stacked.shape[1:], input_size))
        raise InputError(f"`calibrate` has images of {size}, and the model takes {wanted}")
    _check_enough(len(stacked), "`calibrate`")
    if stacked.is_floating_point():
        return Calibration(stacked, (), (), "given")
    return Calibration(stacked, mean, std, "given")


def eval_transform(
    model: nn.Module, input_size: tuple[int, int, int]
) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    """timm's evaluation transform to bytes for a model, and its mean and standard deviation."""
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({"input_size": input_size}, model=model)
    transform = create_transform(**{**config, "input_size": input_size}, is_training=False, normalize=False)
    mean, std = (_for_channels(config[key], input_size[0]) for key in ("mean", "std"))
    return transform, mean, std


def _check_enough(count: int, origin: str) -> None:
    if count < FEWEST:
        raise InputError(f"{origin} has {count} images: give {FEWEST} at least; a few hundred are better")


def _drawn(data: Any, count: int, seed: int) -> Iterator[Tensor]:
    if isinstance(data, ImageStream):
        for number, (image, _) in enumerate(data):
            if number == count:
                return
            yield image
        return
    for index in torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].tolist():
        yield data[index][0]


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


@torch.no_grad()
def predictions(model: nn.Module, calibration: Calibration, of_all: bool = False) -> Tensor | None:
    """A model's log-probabilities on the held-out images, or on all, (n, classes); None where it has no classes."""
    if not count_classes(model):
        return None
    training = model.training
    model.eval()
    batches = calibration.all() if of_all else calibration.held_out()
    logits = torch.cat([model(batch) for batch in batches])
    model.train(training)
    return logits.double().log_softmax(1) if logits.ndim == 2 else None


def compare(source: Tensor | None, converted: Tensor | None, calibration: Calibration) -> Fidelity | None:
    """How far log-probabilities (n, classes) agree: top-1, and the mean of KL(source, converted) in nats."""
    if source is None or converted is None:
        return None
    agreed = (source.argmax(1) == converted.argmax(1)).double().mean()
    divergence = (source.exp() * (source - converted)).sum(1).mean().clamp_min(0)
    return Fidelity(
        images=len(source),
        fitted_on=len(calibration.images) - calibration.held,
        agreement=round(float(agreed), 6),
        divergence=round(float(divergence), 6),
    )
