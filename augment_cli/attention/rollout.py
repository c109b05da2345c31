"""Attention rollout: where a position of the last map draws from through the attention of all layers together.

Abnar and Zuidema (arXiv 2005.00928) multiply the layers' matrices A, each as (A + I) / 2 for the skip connection. Here

    M = (1 - s) I + s A        A, (HW, HW): the weights of one layer, their mean over the heads

with a share s that is measured: how far the model's output moves when each position of this layer attends to itself
alone, over that and the output's length then. Convolutions and skip connections keep what they have in its place.

No M is made: rows of weights are added up a few at a time, so that memory grows with HW and not with its square.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from augment_cli.attention.maps import (
    Grid,
    Size,
    evaluating,
    inputs_of,
    layers_of,
    logits_of,
    queries_and_keys,
    shown_queries,
    smaller,
    window_of,
)
from augment_cli.compat import tree_leaves
from augment_cli.errors import InputError
from augment_cli.layers import AAConv2d
from augment_cli.reporting.units import share, size


@dataclass(frozen=True, eq=False)
class Rollout(Grid):
    """Rollout over layers. n = queries of the last layer's map that are shown + 1; the last map is of all positions.

    shares: the layers in the order in which they run, each with its share s. maps: (n, h, w) on the map of the first
    layer, averaged to a smaller one where it is large: where what attention moved comes from, each map's sum 1.
    outside: share of that from outside the 3x3 window around the query on the last layer's map, mean of those shown.
    """

    shares: dict[str, float]
    maps: Tensor
    outside: float

    @property
    def moved(self) -> float:
        """Share of what arrives at a position that attention brought there; the rest passed no layer's attention."""
        return 1 - math.prod(1 - share for share in self.shares.values())

    @property
    def summary(self) -> str:
        """How much attention moved, and how far, in a sentence without its full stop."""
        if not self.moved:
            return (
                "attention moved nothing: what it computes does not reach the output, as where residual branches end "
                "in zeros, which timm gives to untrained ones"
            )
        return (
            f"attention moved {share(self.moved)} of what arrives at a position, {share(self.outside, 0)} of that from "
            f"outside its 3x3 window on the last map, {size(self.map_size)}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {"map": self.map_size, "moved": self.moved, "outside": self.outside, "shares": self.shares}


@torch.no_grad()
def roll_out(model: nn.Module, image: Tensor, names: list[str]) -> Rollout:
    """Roll out the attention of the named layers of AA on one image (1, C, H, W).

    Layers are taken one after another, in the order of their last calls, also where they stand side by side.

    Raises:
        AugmentError: none of them is a layer of AA, or the model does not run on an image of this size.
    """
    layers = {name: layer for name, layer in layers_of(model).items() if isinstance(layer, AAConv2d) and name in names}
    if not layers:
        raise InputError("rollout needs a layer of AA: AW moves nothing from position to position")
    with evaluating(model):
        inputs, output = inputs_of(model, image, layers)
        shares = {name: _share(model, image, layers[name], output) for name in inputs}
        return _along({name: (layers[name], x) for name, x in inputs.items()}, shares)


def _share(model: nn.Module, image: Tensor, layer: AAConv2d, output: Any) -> float:
    """How far the output moves when the layer's positions attend to themselves, over that and its length then."""
    with _attending_to_itself(layer):
        still = _flat(model(image))
    moved = float((_flat(output) - still).norm())
    return moved / max(moved + float(still.norm()), 1e-30)


@contextmanager
def _attending_to_itself(layer: AAConv2d) -> Iterator[None]:
    def attend(x: Tensor) -> Tensor:
        projected: Tensor = layer.proj(layer.qkv(x)[:, 2 * layer.key_channels :])
        return projected

    vars(layer)["attend"] = attend
    try:
        yield
    finally:
        del vars(layer)["attend"]


def _flat(output: Any) -> Tensor:
    """Every number of a model's output, (n,)."""
    return torch.cat([leaf.double().flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])


def _along(layers: dict[str, tuple[AAConv2d, Tensor]], shares: dict[str, float]) -> Rollout:
    """Queries of the last layer, followed back through every layer to the first."""
    projected = {name: queries_and_keys(layer, x) for name, (layer, x) in layers.items()}
    sizes = {name: (len(tables[0]), len(tables[1])) for name, (_, _, tables) in projected.items()}
    last = size = sizes[next(reversed(sizes))]
    grid, shown = shown_queries(last)
    chosen = nn.functional.one_hot(shown, math.prod(last))
    rows = torch.cat([chosen, torch.ones_like(chosen[:1])]).to(next(iter(projected.values()))[0].dtype)
    rows = still = rows / rows.sum(1, keepdim=True)
    for name in reversed(projected):
        rows, still = (resized(part, size, sizes[name]) for part in (rows, still))
        size, share = sizes[name], shares[name]
        rows = (1 - share) * rows + share * _attended(rows, *projected[name])
        still = (1 - share) * still
    moved = (rows - still).clamp_min(0)
    back = resized(moved[:-1], size, last)
    inside = (back * window_of(shown, last)).sum(1) / back.sum(1).clamp_min(1e-30)
    outside = float(1 - inside.mean()) if float(back.sum()) else 0.0
    return Rollout(last, grid, shares, smaller(moved[None], size)[0], outside)


def _attended(rows: Tensor, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """rows (n, HW) times the mean of the heads' weights (HW, HW), of which a few rows are made at a time."""
    found = torch.zeros_like(rows)
    for places, content, position in logits_of(q, k, tables, torch.arange(q.shape[1])):
        found += rows[:, places] @ (content + position).softmax(-1).mean(0)
    return found


def resized(rows: Tensor, size: Size, new: Size) -> Tensor:
    """Distributions over a map's positions on a map of another size: each position's weight goes where its area lies.

    Shapes: rows (n, H W) to (n, new H new W); sums stay.
    """
    if size == new:
        return rows
    vertical, horizontal = (_overlaps(*sides).to(rows.dtype) for sides in zip(size, new, strict=True))
    return torch.einsum("nhw,hy,wx->nyx", rows.unflatten(1, size), vertical, horizontal).flatten(1)


def _overlaps(old: int, new: int) -> Tensor:
    """(old, new): which share of each of `old` equal parts of a line lies in each of `new`."""
    a, b = torch.arange(old, dtype=torch.float64)[:, None] / old, torch.arange(new, dtype=torch.float64) / new
    return (torch.minimum(a + 1 / old, b + 1 / new) - torch.maximum(a, b)).clamp_min(0) * old
