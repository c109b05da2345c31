"""Sums over calibration images of what attention heads see and what filters compute, from one pass of the source."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment_cli.errors import InputError
from augment_cli.layers import AAConv2d
from augment_cli.layers.aa.attention import attention
from augment_cli.surgery.inherit.calls import recorded
from augment_cli.surgery.inherit.moments import Covariance, Moments

POSITIONS = 2**15
"""Output positions whose moments are summed for a site. On large maps a few images have as many."""


@dataclass
class Seen:
    """Moments of the heads' features against the filters' outputs: of the even and of the odd batches."""

    halves: list[Moments] = field(default_factory=list)

    def half(self, number: int) -> Moments:
        """The sums of a batch by its number. All have one origin, so that they can be added."""
        if number >= len(self.halves):
            self.halves.append(Moments(like=self.halves[0] if self.halves else None))
        return self.halves[number % 2]

    def covariances(self, centred: bool) -> list[Covariance]:
        """Covariances of each half; of the same data twice where there was one batch only."""
        return [half.covariance(centred) for half in (self.halves * 2)[:2]]

    def total(self) -> Moments:
        return self.halves[0] if len(self.halves) == 1 else self.halves[0] + self.halves[1]


@torch.no_grad()
def observe(
    model: nn.Module,
    layers: Mapping[str, AAConv2d],
    batches: Iterable[Tensor],
    images: int,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[dict[str, Seen], Tensor | None]:
    """Run a model with weights on images and sum up, at each named convolution, what its replacement is fitted to.

    Returns the sums, and the model's outputs (images, ...), or None where they are not one tensor.

    Args:
        layers: the replacements by the convolutions' names. Their queries, keys and tables say what the heads see.
        batches: (n, C, H, W), `images` of them in all.
        advance: told how many images are done after each batch.

    Raises:
        AugmentError: activations are not finite.
    """
    seen, answers = {name: Seen() for name in layers}, list[Any]()
    generator = torch.Generator().manual_seed(0)
    done = 0
    for number, batch in enumerate(batches):
        with recorded(model, layers) as calls:
            answers.append(model(batch))
        for name, layer in layers.items():
            for x, computed in calls.pop(name):
                check_finite(name, x, computed)
                features, targets = _drawn(layer, x, computed, images, generator)
                seen[name].half(number).add(features, targets)
        done += len(batch)
        advance(done)
    return seen, torch.cat(answers) if all(isinstance(answer, Tensor) for answer in answers) else None


def _drawn(
    layer: AAConv2d, x: Tensor, computed: Tensor, images: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features and targets at random positions, a batch's share of POSITIONS.

    Shapes: x (N, in_channels, H, W), computed (N, out_channels, H', W'); result (positions, heads, in_channels) and
    (positions, out_channels).
    """
    size = (computed.shape[-2], computed.shape[-1])
    most = max(1, round(POSITIONS * len(x) / images))
    few = max(1, min(len(x), -(-4 * most // (size[0] * size[1]))))  # attention on more images than this is wasted
    maps = head_maps(layer, layer.pool_for_attention(layer.reduce_to_output(x[:few])))
    features, targets = positions(maps, size), positions(computed[:few].unsqueeze(1), size).squeeze(1)
    drawn = torch.randperm(len(features), generator=generator)[:most]
    return features[drawn], targets[drawn]


@torch.no_grad()
def outputs(model: nn.Module, channels: Mapping[str, Tensor], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Some output channels of some modules on images. Shape of each: (N, channels, H', W')."""
    found: dict[str, list[Tensor]] = {name: [] for name in channels}
    for batch in batches:
        with recorded(model, channels) as calls:
            model(batch)
        for name, indices in channels.items():
            found[name] += [out[:, indices] for _, out in calls.pop(name)]
    return {name: torch.cat(parts) for name, parts in found.items()}


def check_finite(name: str, *tensors: Tensor) -> None:
    """Raise AugmentError, which names the site, where a tensor is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError(
            f"{name}: activations on the calibration images are not finite; check the source weights and the images, "
            f"or convert without `calibrate`"
        )


def head_maps(layer: AAConv2d, seen: Tensor) -> Tensor:
    """A_h X of every head. Shapes: (N, in_channels, h, w) to (N, heads, in_channels, h, w)."""
    query, key, _ = layer.qkv(seen).split([layer.key_channels, layer.key_channels, layer.value_channels], dim=1)
    query, key = (t.unflatten(1, (layer.heads, -1)).movedim(2, -1) for t in (query, key))
    value = seen.movedim(1, -1).unsqueeze(1).expand(-1, layer.heads, -1, -1, -1)
    return attention(query, key, value, layer.rel_height, layer.rel_width).movedim(-1, 2)


def positions(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps as a layer brings them to its output's size, as a list of positions.

    Shapes: (N, slots, channels, h, w) to (N H W, slots, channels).
    """
    if maps.shape[-2:] != size:
        brought = F.interpolate(maps.flatten(1, 2), size=size, mode="bilinear", align_corners=False)
        maps = brought.unflatten(1, maps.shape[1:3])
    return maps.permute(0, 3, 4, 1, 2).flatten(0, 2)
