"""Attention of a converted model on an image: where each head looks from each position, and how AW scales its kernels.

Logits are made for a few queries at a time, so that a map of any size is looked into without holding all pairs of its
positions.
"""

import math
from collections.abc import Iterator
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
class HeadMaps:
    """Attention of one AA layer. n = queries of the grid + 1; the last map is the mean over all queries.

    map_size: (height, width) that the attention runs on; grid: rows and columns of shown queries.
    maps: by kind, (heads, n, h, w), each map's sum 1, averaged to a smaller map where the layer's is large.
    outside: weight outside the 3x3 window around the query; entropy: of the weights, nats; position: share of the
    logits' variance that relative positions make. Each (heads,), a mean over `queries` queries.
    numbers: the heads' numbers in the layer, from 0.
    """

    name: str
    numbers: tuple[int, ...]
    map_size: Size
    grid: Size
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


Observed = HeadMaps | KernelMaps


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
def observe(model: nn.Module, image: Tensor, names: list[str]) -> list[Observed]:
    """Run a model on one image (1, C, H, W) and look into the named layers, in the order in which they are called.

    A layer that is called several times is looked at in its last call.

    Raises:
        AugmentError: the model does not run on an image of this size.
    """
    layers, inputs = layers_of(model), dict[str, Tensor]()

    def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    handles = [layers[name].register_forward_pre_hook(partial(keep, name)) for name in names]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with boundary(f"an image of {'x'.join(map(str, image.shape[-2:]))}"):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return [_look(name, layers[name], x) for name, x in inputs.items()]


def _look(name: str, layer: AAConv2d | AWConv2d, x: Tensor) -> Observed:
    return _heads(name, layer, x) if isinstance(layer, AAConv2d) else _kernel(name, layer, x)


def _heads(name: str, layer: AAConv2d, x: Tensor) -> HeadMaps:
    """Maps and numbers of a layer for its input (1, C, H, W)."""
    reduced = layer.pool_for_attention(layer.reduce_to_output(x)).float()
    q, k, _ = layer.qkv(reduced)[0].split([layer.key_channels, layer.key_channels, layer.value_channels])
    height, width = reduced.shape[-2:]
    q, k = (t.unflatten(0, (layer.heads, -1)).flatten(2).transpose(1, 2) for t in (q, k))  # heads, HW, d
    q = q * q.shape[-1] ** -0.5
    tables = by_position(layer.rel_height, height), by_position(layer.rel_width, width)

    grid = min(height, _MOST_GRID), min(width, _MOST_GRID)
    shown = (_spread(height, grid[0])[:, None] * width + _spread(width, grid[1])).flatten()
    size = height, width
    parts = [{kind: _smaller(part[kind], size) for kind in KINDS} for part in _softmaxes(q, k, tables, shown)]

    counted = _spread(height * width, min(height * width, _MOST_QUERIES))
    sums, means = torch.zeros(3, layer.heads, dtype=torch.float64), dict.fromkeys(KINDS, torch.zeros(()))
    for part in _softmaxes(q, k, tables, counted):
        means = {kind: means[kind] + part[kind].sum(1, keepdim=True) / len(counted) for kind in KINDS}
        sums += torch.stack([part[key].double().sum(1) for key in ("outside", "entropy", "share")])
    outside, entropy, position = sums / len(counted)
    maps = {kind: torch.cat([*(p[kind] for p in parts), _smaller(means[kind], size)], 1) for kind in KINDS}
    return HeadMaps(name, tuple(range(layer.heads)), size, grid, maps, outside, entropy, position, len(counted))


def _spread(size: int, count: int) -> Tensor:
    """The middles of `count` equal parts of `size` positions."""
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * size / count).long()


def _softmaxes(q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor], queries: Tensor) -> Iterator[dict[str, Tensor]]:
    """Some queries at a time: the kinds' weights (heads, n, HW), and each query's numbers (heads, n).

    Shapes: q, scaled, and k (heads, HW, d); tables (H, H, d) and (W, W, d); queries: places among the HW positions.
    """
    height, width = len(tables[0]), len(tables[1])
    for places in queries.split(max(1, _MOST_LOGITS // (len(q) * height * width))):
        chosen, y, x = q[:, places], places // width, places % width
        content = chosen @ k.transpose(1, 2)
        rows, columns = (
            torch.einsum("hnd,njd->hnj", chosen, table[at]) for table, at in zip(tables, (y, x), strict=True)
        )
        position = (rows.unsqueeze(-1) + columns.unsqueeze(-2)).flatten(2)
        weights = (content + position).softmax(-1)
        near_y, near_x = (abs(torch.arange(n) - at[:, None]) <= 1 for n, at in ((height, y), (width, x)))
        window = (near_y.unsqueeze(-1) & near_x.unsqueeze(-2)).flatten(1)
        varied = [logits.double().var(-1, correction=0) for logits in (content, position)]
        yield {
            "weights": weights,
            "content": content.softmax(-1),
            "position": position.softmax(-1),
            "outside": (weights * ~window).sum(-1),
            "entropy": torch.special.entr(weights).sum(-1),
            "share": varied[1] / (varied[0] + varied[1]).clamp_min(1e-30),
        }


def _smaller(maps: Tensor, size: Size) -> Tensor:
    """Maps (heads, n, HW) of a size averaged to sides that are shown, (heads, n, h, w), each with the sum 1."""
    height, width = (min(side, _MOST_SHOWN) for side in size)
    pooled = F.adaptive_avg_pool2d(maps.unflatten(-1, size), (height, width))
    return pooled / pooled.sum((-2, -1), keepdim=True)


def _kernel(name: str, layer: AWConv2d, x: Tensor) -> KernelMaps:
    scales = layer.scales(x).float()
    attended = layer.expand(scales)[0].unflatten(0, (layer.expand.groups, -1))  # C1/r, outputs of each, h, w
    size = attended.abs()
    return KernelMaps(
        name, attended.mean(1), float(size.mean()), float(size.max()), float((scales == 0).double().mean())
    )
