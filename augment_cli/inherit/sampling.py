"""What a site sees and computes on the calibration images: the forward pass ends at the site."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment_cli.errors import AugmentError
from augment_cli.layers import AAConv2d

# What a sample may hold, and how many positions there is any use for: on large maps few images have enough.
_BYTES = 2**28
_POSITIONS = 3 * 2**15


@dataclass(frozen=True)
class Sample:
    """A site's data on some images: what attention sees, and what the convolution computes from the same input.

    Shapes: seen (N, in_channels, h, w), h and w those of the map that the attention runs on; computed (N, out_channels,
    H, W).
    """

    seen: Tensor
    computed: Tensor

    def parts(self, size: int = 32) -> Iterator["Sample"]:
        for seen, computed in zip(self.seen.split(size), self.computed.split(size), strict=True):
            yield Sample(seen, computed)

    def split(self, first: int) -> tuple["Sample", "Sample"]:
        """The first images and the others."""
        return Sample(self.seen[:first], self.computed[:first]), Sample(self.seen[first:], self.computed[first:])


class _Reached(Exception):
    """The forward pass has come to the site."""


@torch.no_grad()
def sample_site(model: nn.Module, name: str, layer: AAConv2d, batches: Iterable[Tensor], share: float) -> Sample:
    """Run a model up to a convolution.

    Args:
        layer: what the convolution becomes: it says what its attention sees.
        share: of what a sample may hold, for these batches. Images beyond that are left out.

    Raises:
        AugmentError: activations that are not finite.
    """
    conv = model.get_submodule(name)
    seen, computed = [], []

    def stop(module: nn.Module, args: tuple[Tensor]) -> None:
        computed.append(conv.forward(args[0]))
        seen.append(layer.pool_for_attention(layer.reduce_to_output(args[0])))
        raise _Reached

    memory, places = share * _BYTES, share * _POSITIONS
    with conv.register_forward_pre_hook(stop):
        for batch in batches:
            with suppress(_Reached):
                model(batch)
            _check_finite(name, seen[-1], computed[-1])
            memory -= sum(t.numel() * t.element_size() for t in (seen[-1], computed[-1]))
            places -= computed[-1][:, 0].numel()
            if memory <= 0 or places <= 0:
                break
    return Sample(torch.cat(seen), torch.cat(computed))


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise AugmentError(
            f"{name}: activations on the calibration images are not finite; check the source weights and the images, "
            f"or convert with --init carry"
        )


def window_maps(seen: Tensor, window: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """What heads on one tap each see: shifted copies; beyond an edge, the nearest position.

    Shapes: (N, channels, h, w) to (N, taps, channels, h, w).
    """
    height, width = seen.shape[-2:]
    reach = [(size // 2) * distance for size, distance in zip(window, step, strict=True)]
    padded = F.pad(seen, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    tops, lefts = ([i * d for i in range(size)] for size, d in zip(window, step, strict=True))
    return torch.stack([padded[..., y : y + height, x : x + width] for y in tops for x in lefts], dim=1)


def positions(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps as a layer brings them to its output's size, as a list of positions.

    Shapes: (N, slots, channels, h, w) to (N H W, slots, channels).
    """
    if maps.shape[-2:] != size:
        maps = bring_to(maps.flatten(1, 2), size).unflatten(1, maps.shape[1:3])
    return maps.permute(0, 3, 4, 1, 2).flatten(0, 2)


def bring_to(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Shapes: (N, channels, h, w) to (N, channels, H, W)."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
