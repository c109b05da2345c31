"""Attention of a converted model on an image: where each head looks from each position, and how AW scales its kernels.

Logits are made for a few queries at a time, so that a map of any size is looked into without holding all pairs of its
positions.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment_cli.errors import InputError, boundary, nearest
from augment_cli.layers import AAConv2d, AWConv2d
from augment_cli.layers.aa.relative import by_position

KINDS = ("weights", "content", "position")
"""Softmax of all logits, of the content logits alone, and of the relative-position logits alone."""

# Logits at a time, queries that numbers are means of, and the sides of the shown grid and its maps.
_MOST_LOGITS = 2**22
_MOST_QUERIES = 4096
_MOST_GRID, _MOST_SHOWN = 14, 24

Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Grid:
    """Queries that are shown of a map: its (height, width), and the rows and columns of queries."""

    map_size: Size
    grid: Size

    @property
    def centres(self) -> tuple[list[float], list[float]]:
        """The middles of the grid's rows and columns of queries, as shares of the image's height and width."""
        rows, columns = (
            ((_spread(size, count).double() + 0.5) / size).tolist()
            for size, count in zip(self.map_size, self.grid, strict=True)
        )
        return rows, columns

    def nearest(self, x: float, y: float) -> int:
        """The grid's query at a place of the image; x and y from 0 to 1."""
        rows, columns = self.grid
        return min(int(y * rows), rows - 1) * columns + min(int(x * columns), columns - 1)


@dataclass(frozen=True, eq=False)
class HeadMaps(Grid):
    """Attention of one AA layer. n = queries of the grid + 1; the last map is the mean over all queries.

    maps: by kind, (heads, n, h, w), each map's sum 1, averaged to a smaller map where the layer's is large.
    outside: weight outside the 3x3 window around the query; entropy: of the weights, nats; position: share of the
    logits' variance that relative positions make. Each (heads,), a mean over `queries` queries.
    numbers: the heads' numbers in the layer, from 0.
    """

    name: str
    numbers: tuple[int, ...]
    maps: dict[str, Tensor]
    outside: Tensor
    entropy: Tensor
    position: Tensor
    queries: int

    @property
    def heads(self) -> int:
        return len(self.numbers)

    def only(self, numbers: tuple[int, ...]) -> "HeadMaps":
        """These heads alone, as far as the layer has them."""
        places = [i for i, number in enumerate(self.numbers) if number in numbers]
        values = {key: getattr(self, key)[places] for key in ("outside", "entropy", "position")}
        maps = {kind: found[places] for kind, found in self.maps.items()}
        return replace(self, numbers=tuple(self.numbers[i] for i in places), maps=maps, **values)

    def to_dict(self) -> dict[str, Any]:
        keys = ("outside", "entropy", "position")
        rows = zip(self.numbers, *(getattr(self, key).tolist() for key in keys), strict=True)
        heads = [dict(zip(("head", *keys), row, strict=True)) for row in rows]
        uniform = math.log(math.prod(self.map_size))
        return {"name": self.name, "map": self.map_size, "queries": self.queries, "uniform": uniform, "heads": heads}


@dataclass(frozen=True, eq=False)
class KernelMaps:
    """A of one AW layer for an image: (groups of input channels, h, w), the mean over the output channels.

    The kernel is multiplied by 1 + A. magnitude: mean of |A| over all its entries; largest: the largest |A|; idle:
    share of the scales A2 that their ReLU sets to 0.
    """

    name: str
    mean: Tensor
    magnitude: float
    largest: float
    idle: float

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("name", "magnitude", "largest", "idle")}


def layers_of(model: nn.Module) -> dict[str, AAConv2d | AWConv2d]:
    """The layers of a model that attend, by name; those inside others too, such as AW's in the convolution of AA."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (AAConv2d, AWConv2d))}


def choose(model: nn.Module, globs: tuple[str, ...] = ()) -> list[str]:
    """The layers whose names match; without globs the last of each size of the relative tables, and the last AW layer.

    Raises:
        AugmentError: the model has no layer that attends, or a glob matches none.
    """
    layers = layers_of(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no layer of AA or AW: convert it first")
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise InputError(f"no layer that attends is named {glob}{nearest(glob, layers)}")
    if globs:
        return [name for name in layers if any(fnmatchcase(name, glob) for glob in globs)]
    last = {
        (layer.resolution, layer.attention_pool) if isinstance(layer, AAConv2d) else "aw": name
        for name, layer in layers.items()
    }
    return [name for name in layers if name in last.values()]


@torch.no_grad()
def observe(model: nn.Module, image: Tensor, names: list[str]) -> list[HeadMaps | KernelMaps]:
    """Run a model on one image (1, C, H, W) and look into the named layers, in the order in which they are called.

    A layer that is called several times is looked at in its last call.

    Raises:
        AugmentError: the model does not run on an image of this size.
    """
    layers = layers_of(model)
    with evaluating(model):
        return [_look(name, layers[name], x) for name, x in inputs_of(model, image, names)[0].items()]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the block; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def inputs_of(model: nn.Module, image: Tensor, names: Iterable[str]) -> tuple[dict[str, Tensor], Any]:
    """Run a model on an image: the inputs of the named layers in the order of their last calls, and its output.

    Raises:
        AugmentError: the model does not run on an image of this size.
    """
    inputs = dict[str, Tensor]()

    def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.pop(name, None)
        inputs[name] = args[0]

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(keep, name)) for name in names]
    try:
        with boundary(f"an image of {'x'.join(map(str, image.shape[-2:]))}"):
            output = model(image)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, output


def _look(name: str, layer: AAConv2d | AWConv2d, x: Tensor) -> HeadMaps | KernelMaps:
    return _heads(name, layer, x) if isinstance(layer, AAConv2d) else _kernel(name, layer, x)


def _heads(name: str, layer: AAConv2d, x: Tensor) -> HeadMaps:
    """Maps and numbers of a layer for its input (1, C, H, W)."""
    q, k, tables = queries_and_keys(layer, x)
    size = height, width = len(tables[0]), len(tables[1])
    grid, shown = shown_queries(size)
    parts = [{kind: smaller(part[kind], size) for kind in KINDS} for part in _softmaxes(q, k, tables, shown)]

    counted = _spread(height * width, min(height * width, _MOST_QUERIES))
    sums, means = torch.zeros(3, layer.heads, dtype=torch.float64), dict.fromkeys(KINDS, torch.zeros(()))
    for part in _softmaxes(q, k, tables, counted):
        means = {kind: means[kind] + part[kind].sum(1, keepdim=True) / len(counted) for kind in KINDS}
        sums += torch.stack([part[key].double().sum(1) for key in ("outside", "entropy", "share")])
    outside, entropy, position = sums / len(counted)
    maps = {kind: torch.cat([*(p[kind] for p in parts), smaller(means[kind], size)], 1) for kind in KINDS}
    return HeadMaps(size, grid, name, tuple(range(layer.heads)), maps, outside, entropy, position, len(counted))


def queries_and_keys(layer: AAConv2d, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Scaled queries, keys (heads, HW, d) and tables (H, H, d), (W, W, d) of a layer for its input (1, C, H', W')."""
    reduced = layer.pool_for_attention(layer.reduce_to_output(x))
    height, width = reduced.shape[-2:]
    projected = layer.qkv(reduced)[0, : 2 * layer.key_channels]
    projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
    q, k = (t.unflatten(0, (layer.heads, -1)).flatten(2).transpose(1, 2) for t in projected.chunk(2))
    return q * q.shape[-1] ** -0.5, k, (by_position(layer.rel_height, height), by_position(layer.rel_width, width))


def shown_queries(size: Size) -> tuple[Size, Tensor]:
    """The rows and columns of the grid of queries that are shown of a map, and their places among its positions."""
    rows, columns = (min(side, _MOST_GRID) for side in size)
    return (rows, columns), (_spread(size[0], rows)[:, None] * size[1] + _spread(size[1], columns)).flatten()


def _spread(size: int, count: int) -> Tensor:
    """The middles of `count` equal parts of `size` positions."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * size / count).long()


def _softmaxes(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], queries: Tensor) -> Iterator[dict[str, Tensor]]:
    """Some queries at a time: the kinds' weights (heads, n, HW), and each query's numbers (heads, n).

    Shapes: q, scaled, and k (heads, HW, d); tables (H, H, d) and (W, W, d); queries: places among the HW positions.
    """
    size = len(tables[0]), len(tables[1])
    for places, content, position in logits_of(q, k, tables, queries):
        weights = (content + position).softmax(-1)
        window = window_of(places, size)
        varied = [logits.double().var(-1, correction=0) for logits in (content, position)]
        yield {
            "weights": weights,
            "content": content.softmax(-1),
            "position": position.softmax(-1),
            "outside": (weights * ~window).sum(-1),
            "entropy": torch.special.entr(weights).sum(-1),
            "share": varied[1] / (varied[0] + varied[1]).clamp_min(1e-30),
        }


def logits_of(
    q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], queries: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Some queries at a time: their places (n,), and their content and position logits, each (heads, n, HW)."""
    height, width = len(tables[0]), len(tables[1])
    for places in queries.split(max(1, _MOST_LOGITS // (len(q) * height * width))):
        chosen = q[:, places]
        rows, columns = (
            torch.einsum("hnd,njd->hnj", chosen, table[at])
            for table, at in zip(tables, (places // width, places % width), strict=True)
        )
        yield places, chosen @ k.transpose(1, 2), (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(2)


def window_of(places: Tensor, size: Size) -> Tensor:
    """Which positions of a map are in the 3x3 window around each of some places: (n, HW), bool."""
    near_y, near_x = (
        abs(torch.arange(side) - at[:, None]) <= 1
        for side, at in zip(size, (places // size[1], places % size[1]), strict=True)
    )
    return (near_y.unsqueeze(-1) & near_x.unsqueeze(-2)).flatten(1)


def smaller(maps: Tensor, size: Size) -> Tensor:
    """Maps (heads, n, HW) of a size averaged to sides that are shown, (heads, n, h, w); sums are 1 unless all is 0."""
    height, width = (min(side, _MOST_SHOWN) for side in size)
    pooled = F.adaptive_avg_pool2d(maps.unflatten(-1, size), (height, width))
    return pooled / pooled.sum((-2, -1), keepdim=True).clamp_min(1e-30)


def _kernel(name: str, layer: AWConv2d, x: Tensor) -> KernelMaps:
    scales = layer.scales(x).float()
    attended = layer.expand(scales)[0].unflatten(0, (layer.expand.groups, -1))  # C1/r, outputs of each, h, w
    size = attended.abs()
    return KernelMaps(
        name, attended.mean(1), float(size.mean()), float(size.max()), float((scales == 0).double().mean())
    )
