"""Call the Triton kernels of AA's attention, `attention_kernels.py`. Importing this imports Triton."""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from augment_cli.layers.triton import attention_kernels as kernels
from augment_cli.layers.triton import is_interpreted, on_device_of, padded

_LOG2_E = 1.4426950408889634

# Positions in a tile of queries and of keys, warps, and stages of the loops' loads, by how products are computed and by
# the padded channels of a head: the largest tiles whose numbers stay in registers, or nearly so
# (benchmarks/compiled_kernels.py). Nothing has been timed; benchmarks/gpu_tune.py does.
SIZES = {
    "ieee": {32: (64, 16, 8, 1), 64: (32, 16, 8, 1), 128: (16, 16, 8, 1)},
    "tf32": {32: (64, 32, 8, 1), 64: (32, 32, 8, 1), 128: (32, 16, 8, 1)},
    "half": {32: (64, 64, 4, 1), 64: (64, 32, 8, 1), 128: (32, 32, 8, 1)},
}

Results = tuple[Tensor, ...]
Gradients = tuple[Tensor, ...]


class Tile(NamedTuple):
    """Rows and columns of the map in one tile."""

    y: int
    x: int


@cache
def tile_for(positions: int, height: int, width: int) -> Tile:
    """The tile of so many positions, a power of two, that covers the map with the fewest; square ones first.

    A side is at most four times the other: kernels are compiled for each shape of tiles, which takes seconds, and maps
    of many sizes, as in detection, shall not need many.
    """
    sides = [1 << i for i in range(positions.bit_length())]
    tiles = sorted((Tile(y, positions // y) for y in sides), key=lambda t: abs(math.log2(t.x / t.y)))
    near_square = [t for t in tiles if max(t) <= 4 * min(t)]
    return min(near_square, key=lambda t: -(-height // t.y) * -(-width // t.x))


def forward(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Results:
    """The result, and for each query the shift and the sum of its weights, as in `attention_kernels`.

    Shapes: q, k (N, heads, d, HW); v and result (N, heads, e, HW); tables (2 H - 1, d) and (2 W - 1, d); shifts and
    sums (N, heads, HW), float32. The maps may have any strides.
    """
    out, shifts, sums = results = empty_results(q, k, v)
    if out.numel():
        call = _Call(q, k, v, rel_height, rel_width)
        call.run(kernels.attention_forward, "Q", out, shifts, sums, scales=1)
    return results


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    out: Tensor,
    shifts: Tensor,
    sums: Tensor,
) -> Gradients:
    """Gradients of the five inputs of `forward`, each in its input's shape and dtype."""
    if not out.numel():
        return tuple(torch.zeros_like(t) for t in (q, k, v, rel_height, rel_width))
    d_q, d_k, d_v, d_height, d_width = empty_gradients(q, k, v, rel_height, rel_width)
    d_out, out, shifts, sums = (t.contiguous() for t in (d_out, out, shifts, sums))
    call, deltas = _Call(q, k, v, rel_height, rel_width), torch.empty_like(sums)
    of_width = call.empty_windows("Q", call.tiles("K")[1], "X")
    of_height = call.empty_windows("K", call.tiles("Q")[0], "Y")
    call.run(kernels.queries_backward, "Q", out, shifts, sums, d_out, deltas, d_q, of_width, scales=2)
    call.run(kernels.keys_backward, "K", shifts, sums, d_out, deltas, d_k, d_v, of_height, scales=2)
    # tiles of queries, tiles of keys, P, d
    call.add_windows(of_height.sum((0, 2)).transpose(0, 1), "Y", call.height, d_height)
    call.add_windows(of_width.sum((0, 1)), "X", call.width, d_width)
    return d_q, d_k, d_v, d_height, d_width


def empty_results(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Results:
    """Tensors for the results of `forward`."""
    batch, heads, _, positions = q.shape
    shifts, sums = (q.new_empty(batch, heads, positions, dtype=torch.float32) for _ in range(2))
    return v.new_empty(v.shape), shifts, sums


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Gradients:
    """Tensors for the results of `backward`."""
    q, k, v, rel_height, rel_width = (t.new_empty(t.shape) for t in (q, k, v, rel_height, rel_width))
    return q, k, v, rel_height, rel_width


class _Call:
    """Sizes of one call, and the arguments that all three kernels take."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> None:
        self.tasks, self.heads, self.d = q.shape[0] * q.shape[1], q.shape[1], q.shape[2]
        self.height, self.width = (len(rel_height) + 1) // 2, (len(rel_width) + 1) // 2
        self.inputs = q, k, v, rel_height.contiguous(), rel_width.contiguous()
        self.options = kernel_options(q.dtype, self.d, v.shape[2], self.height, self.width)
        self.aligned = {"ALIGNED_D": aligned(q, k), "ALIGNED_E": aligned(v)}

    def tiles(self, side: str) -> tuple[int, int]:
        """Rows and columns of tiles of queries ("Q") or of keys ("K")."""
        return -(-self.height // self.options[f"{side}Y"]), -(-self.width // self.options[f"{side}X"])

    def run(self, kernel: Any, side: str, *tensors: Tensor, scales: int) -> None:
        """Launch a kernel, one program for each tile of queries or of keys of each head."""
        strides = [step for t in self.inputs[:3] for step in t.stride()]
        scale = self.d**-0.5
        numbers = self.heads, self.height, self.width, *(scale * _LOG2_E, scale)[:scales]
        grid = (self.tasks * math.prod(self.tiles(side)),)
        with on_device_of(self.inputs[0]):
            kernel[grid](*self.inputs, *tensors, *strides, *numbers, **self.aligned, **self.options)

    def empty_windows(self, side: str, windows: int, axis: str) -> Tensor:
        """Sums of each program for each window of one table: (B, rows of tiles, columns of tiles, windows, P, d)."""
        shape = self.tasks, *self.tiles(side), windows, self.options[f"P{axis}"], self.d
        return torch.empty(shape, dtype=torch.float32, device=self.inputs[0].device)

    def add_windows(self, sums: Tensor, axis: str, size: int, d_table: Tensor) -> None:
        """Add up the sums for windows of a table, where they overlap, to the gradient of the table.

        Shapes: sums (tiles of queries, tiles of keys, P, d), d_table (2 size - 1, d).
        """
        queries, keys, *_ = sums.shape
        constants = {name: self.options[name] for name in ("D", "PADDED_D")}
        constants |= {"Q": self.options[f"Q{axis}"], "K": self.options[f"K{axis}"], "TILES": padded(queries, 1)}
        with on_device_of(sums):
            kernel = kernels.table_backward[(len(d_table),)]
            kernel(
                sums, d_table, *sums.stride()[:2], size, queries, keys, **constants, num_warps=1, enable_fp_fusion=True
            )


def aligned(*maps: Tensor) -> int:
    """Channels of a position that one load can take: a power of two up to 8, 1 where they are not side by side.

    Triton knows of a step only whether 16 divides it, and heads of 20 channels are 20 apart in channels-last maps.
    """
    if any(t.stride(2) != 1 for t in maps):
        return 1
    return math.gcd(8, *(step for t in maps for step in (t.stride(0), t.stride(1), t.stride(3))))


def kernel_options(dtype: torch.dtype, d: int, e: int, height: int, width: int) -> dict[str, Any]:
    """Constants that the kernels are compiled for, and the options of their launch."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    products = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    precision = "interpreted" if is_interpreted() else "tf32" if products == "tf32" else "ieee"
    q, k, warps, stages = SIZES[products][max(padded(d), padded(e), 32)]
    (qy, qx), (ky, kx) = tile_for(q, height, width), tile_for(k, height, width)
    constants = {"D": d, "E": e, "PADDED_D": padded(d), "PADDED_E": padded(e), "PRECISION": precision}
    constants |= {"QY": qy, "QX": qx, "KY": ky, "KX": kx, "PY": padded(qy + ky), "PX": padded(qx + kx)}
    return {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
