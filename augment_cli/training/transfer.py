"""Batches on their way to the device: images cross as bytes, and are normalised there.

accelerate's loader calls `to` of a batch that has one; copying and arithmetic run on a stream of their own, while the
batch before is still being computed. timm's PrefetchLoader does the same, but runs one batch ahead of that loader:
the last batch but one would pass for the last, and end a group of accumulated batches. It also draws what is erased by
batch, where a resumed run needs it by image.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

Patch = tuple[int, int, Tensor]
"""Top, left and pixels (C, h, w) of a part of an image that is erased."""


@dataclass(frozen=True)
class Batch:
    """Images (N, C, H, W) in bytes and labels (N,), as worker processes send them.

    places (M, 5): image, top, left, height and width of every erased part; pixels: what they are filled with, one after
    the other, float32. Both are None where nothing is erased.
    """

    collate: "Collate"
    images: Tensor
    labels: Tensor
    places: Tensor | None = None
    pixels: Tensor | None = None

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory, from which it is copied while the device computes. torch's loader calls it."""
        pixels = None if self.pixels is None else self.pixels.pin_memory()
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory(), pixels=pixels)

    def to(self, device: torch.device, non_blocking: bool = True) -> tuple[Tensor, Tensor]:
        """Normalised images (N, C, H, W), float32, and labels (N,), on the device. accelerate calls it."""
        with aside(device) as used:
            images = self.collate.normalize(self.images.to(device, non_blocking=True))
            if self.places is not None and self.pixels is not None:
                _fill(images, self.places, self.pixels.to(device, non_blocking=True))
            labels = self.labels.to(device, non_blocking=True)
            used += [images, labels]
        return images, labels


@dataclass(frozen=True)
class Collate:
    """Makes a batch of samples. mean, std: of each channel, for pixels from 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False

    def __call__(self, samples: Sequence[tuple[Any, int]]) -> Batch:
        """samples: images (C, H, W) in bytes, or what `Erase` makes of them, and labels."""
        drawn = [sample[0] if isinstance(sample[0], tuple) else (sample[0], []) for sample in samples]
        labels = torch.tensor([label for _, label in samples])
        batch = Batch(self, default_collate([image for image, _ in drawn]), labels)
        found = [(number, *patch) for number, (_, patches) in enumerate(drawn) for patch in patches]
        if not found:
            return batch
        places = torch.tensor([(number, top, left, *pixels.shape[1:]) for number, top, left, pixels in found])
        return replace(batch, places=places, pixels=torch.cat([pixels.flatten() for *_, pixels in found]))

    def normalize(self, images: Tensor) -> Tensor:
        """Bytes to float32. Shapes: (N, C, H, W) to the same."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        mean, std = _constants(self.mean, images.device), _constants(self.std, images.device)
        return images.to(torch.float32, memory_format=layout).sub_(mean).div_(std)


class Erase:
    """A transform and timm's RandomErasing after it, which the device carries out once images are normalised."""

    def __init__(self, transform: Any, probability: float) -> None:
        from timm.data.random_erasing import RandomErasing

        self.transform = transform
        self.erasing = RandomErasing(probability, mode="pixel", device="cpu")

    def __call__(self, picture: Any) -> tuple[Tensor, list[Patch]]:
        image = self.transform(picture)
        patches = _Patches(image.shape)
        self.erasing(patches)
        return image, list(patches)


class _Patches(list[Patch]):
    """Stands for an image, and keeps what RandomErasing assigns to it: `image[:, top:bottom, left:right] = pixels`."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, place: Any, pixels: Any) -> None:
        _, rows, columns = place
        self.append((rows.start, columns.start, pixels))


def _fill(images: Tensor, places: Tensor, pixels: Tensor) -> None:
    first = 0
    for image, top, left, height, width in places.tolist():
        part = images[image, :, top : top + height, left : left + width]
        part.copy_(pixels[first : first + part.numel()].view(part.shape))
        first += part.numel()


@cache
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values of channels, for pixels from 0 to 255. Shape: (1, C, 1, 1)."""
    return torch.tensor([255 * value for value in values], device=device).view(1, -1, 1, 1)


@contextmanager
def aside(device: torch.device) -> Iterator[list[Tensor]]:
    """Work beside what the device computes now, on a stream of its own; elsewhere than on CUDA as usual.

    Yields a list for the tensors that are used afterwards: their memory stays until the current stream is done with it.
    """
    made: list[Tensor] = []
    if device.type != "cuda":
        yield made
        return
    stream, current = _stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        yield made
    current.wait_stream(stream)
    for tensor in made:
        tensor.record_stream(current)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all batches: memory that a stream leaves can be taken by the same one only."""
    return torch.cuda.Stream(device)
