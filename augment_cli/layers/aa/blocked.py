"""The attention core of AA in blocks that stay in a CPU's cache: exact, O(HW) memory.

Same function as `augment_cli.layers.aa.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).

The layout, and the reasons for it:

- Maps stay channels first, (N heads, channels, HW), as a 1x1 convolution leaves them, and a block of logits is keys x
  queries. Each product then has one of the two forms that a BLAS runs fast on such thin matrices, sums over keys run
  along contiguous memory, and the result is channels first.
- A block starts as the relative logits, and the product of keys and queries is added to it.
- Logits are in powers of two (multiplied by log2 e), because exp2 is several times faster than exp. The product of keys
  and queries and the tables carry this factor and d^(-1/2), so that no map is scaled.
- A row of ones below v gives the sums of the weights in the same product as the result, by which it is divided.
- A query's largest logit is found and subtracted only if the sum of its weights comes near overflow or underflow. The
  check of the sums takes a hundredth of the time of finding the largest logits.
- The backward pass recomputes each block. A query's weights are 2^(logit - shift) / sum. Shift and sum are separate
  numbers: one float32 log-sum-exp of magnitude 10^8 is rounded to a multiple of 8, and the weights would be wrong by
  factors. The gradient of a weight is centred by the weighted mean of the same numbers: where one key has all the
  weight, the gradient of its logit is exactly zero, and not a rounding error multiplied by the queries.
- Each thread keeps its memory for blocks, because the system hands out fresh memory page by page, which can take longer
  than the arithmetic. It keeps two blocks of its largest call so far; `free_blocks` gives them back.
"""

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from augment_cli.layers.aa.first_order import FirstOrder, Gradients, has_tangents
from augment_cli.layers.aa.relative import by_position
from augment_cli.layers.dispatch import operator

BLOCK_BYTES = 1_600_000
"""Bytes of a block of logits for each thread: a little more than a second-level cache of 1 MiB. Measured on the machine
of benchmarks/results/layers-1-thread.json, where up to twice as many are as fast."""

_LOG2_E = math.log2(math.e)
_SAFE_SUM = 2.0**60
"""Bound of a query's sum of weights, and by its inverse from below. Values up to 2^40 times it stay far below float32's
largest number, and weights that vanish beside its inverse are negligible."""

Size = tuple[int, int]
Shape = tuple[int, ...]
Results = tuple[Tensor, Tensor, Tensor]
InputGradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def blocked_relative_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor, *, block_bytes: int | None = None
) -> Tensor:
    """Attention of every position to every other, in blocks of logits of at most about `block_bytes`.

    By default a block has BLOCK_BYTES for each of torch's threads, which share it.

    Half-precision inputs are computed in float32, the result has v's dtype, and autocast has no effect. Only gradients
    of first order, by `backward` or `torch.func.grad`: `torch.func.vmap`, forward mode and second derivatives raise a
    RuntimeError.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return blocked_relative_attention(q, k, v, rel_height, rel_width, block_bytes=block_bytes)
    height, width = q.shape[2:4]
    block_bytes = block_bytes or BLOCK_BYTES * torch.get_num_threads()
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 * _LOG2_E
    maps = (_channels_first(t.to(dtype)) for t in (q, k, v))
    tables = (by_position(t.to(dtype) * scale, s) for t, s in ((rel_height, height), (rel_width, width)))
    inputs = *maps, *tables, (height, width), scale, block_bytes
    if torch.is_grad_enabled() or has_tangents(q, k, v, rel_height, rel_width):
        out, _, _ = _Attention.apply(*inputs)
    else:  # a Function gains nothing here, and its call takes as long as one of the products
        out, _, _ = _attention(*inputs)
    return out.view(*q.shape[:2], v.shape[-1], height, width).movedim(2, -1).to(v.dtype)


class _Attention(FirstOrder):
    """Attention of channels-first maps: `scale` is log2(e) d^(-1/2), the tables are by absolute position and scaled.

    Shapes: q, k (B, d, HW); v (B, e, HW); tables (H, H, d) and (W, W, d); result (B, e, HW); shifts and sums
    (B, 1, HW). B is N heads.
    """

    @staticmethod
    def forward(*inputs: Any) -> Results:
        return _attention(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Results) -> None:
        *tensors, ctx.size, ctx.scale, ctx.block_bytes = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(d_out.device.type, enabled=False):
            gradients = _Gradients.apply if torch.is_grad_enabled() else _attention_backward
            settings = ctx.size, ctx.scale, ctx.block_bytes
            return *gradients(d_out, *ctx.saved_tensors, *settings), None, None, None


class _Gradients(Gradients):
    """Gradients of `_Attention`."""

    @staticmethod
    def forward(*inputs: Any) -> InputGradients:
        return _attention_backward(*inputs)


def _run(
    q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor, size: Size, scale: float, block_bytes: int
) -> Results:
    """The result, and for each query the shift and the sum of its weights. Shapes: as for `_Attention`."""
    values = _with_ones(v)
    sums = torch.empty_like(values)
    out, total = sums[:, :-1], sums[:, -1:]
    blocks = _Blocks(q, size, scale, block_bytes)
    for part in blocks.parts():
        _attend(blocks, q[part], k[part], values[part], rel_height, rel_width, sums[part])
    if not total.numel() or _is_safe(total):
        mantissas, exponents = total.frexp()
        return out / total, exponents.to(total.dtype), mantissas
    peaks = torch.empty_like(total)
    for part in blocks.parts():
        _attend(blocks, q[part], k[part], values[part], rel_height, rel_width, sums[part], peaks[part])
    return out / total, peaks, total.contiguous()


def _run_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    shifts: Tensor,
    sums: Tensor,
    size: Size,
    scale: float,
    block_bytes: int,
) -> InputGradients:
    """Gradients of the five inputs. Shapes: as for `_Attention`."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_rel_height, d_rel_width = torch.zeros_like(rel_height), torch.zeros_like(rel_width)
    d_out = d_out / sums
    blocks = _Blocks(q, size, scale, block_bytes)
    for part in blocks.parts():
        d_out_, shifts_, sums_, q_, k_, v_ = (t[part] for t in (d_out, shifts, sums, q, k, v))
        grads = dq[part], dk[part], dv[part], d_rel_height, d_rel_width
        _attend_backward(blocks, d_out_, shifts_, sums_, q_, k_, v_, rel_height, rel_width, grads)
    return dq, dk, dv, d_rel_height, d_rel_width


def _results(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Results:
    return torch.empty_like(v), torch.empty_like(q[:, :1]), torch.empty_like(q[:, :1])


def _gradient_results(d_out: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in inputs[:5])


def _flops(
    q_shape: Shape, k_shape: Shape, v_shape: Shape, height_shape: Shape, width_shape: Shape, *_: Any, **__: Any
) -> int:
    """Products of queries with keys and with the tables' rows, and of weights with values."""
    heads, d, positions = q_shape
    return 2 * heads * positions * (positions * (d + v_shape[1]) + (height_shape[0] + width_shape[0]) * d)


def _backward_flops(d_out_shape: Shape, *inputs: Any, **_: Any) -> int:
    """Twice the forward pass: each product has two in its derivative. Recomputed blocks are not counted."""
    return 2 * _flops(*inputs)


_SETTINGS = "int[] size, float scale, int block_bytes"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor rel_height, Tensor rel_width"
_attention = operator(f"blocked_attention({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)", _run, _results, _flops)
_attention_backward = operator(
    f"blocked_attention_backward(Tensor d_out, {_INPUTS}, Tensor shifts, Tensor sums, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _gradient_results,
    _backward_flops,
)


def _is_safe(total: Tensor) -> bool:
    lowest, highest = (end.item() for end in total.aminmax())
    return lowest > 1 / _SAFE_SUM and highest < _SAFE_SUM


def _attend(
    blocks: "_Blocks",
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    sums: Tensor,
    peaks: Tensor | None = None,
) -> None:
    """Write the weighted sums of some heads' values to `sums`; weights are 2^logit.

    With `peaks`, the largest logit of each query is written to it, and weights are 2^(logit - peak).

    Shapes: q, k (b, d, HW); v, sums (b, e + 1, HW), where the last channel of v is ones; peaks (b, 1, HW); tables
    (H, H, d) and (W, W, d).
    """
    lines = _by_row(q, blocks.size), _by_column(q, blocks.size)
    of_queries = (q, *_relative_logits(*lines, rel_height, rel_width, blocks.size), sums)
    for (k_, v_), (q_, rows_, columns_, sums_, *peaks_) in blocks.split(
        (k, v), of_queries if peaks is None else (*of_queries, peaks)
    ):
        block = blocks.logits(q_, k_, rows_, columns_)
        for peak in peaks_:
            block.sub_(torch.amax(block, 1, keepdim=True, out=peak))
        torch.bmm(v_, block.exp2_(), out=sums_)


def _attend_backward(
    blocks: "_Blocks",
    d_out: Tensor,
    shifts: Tensor,
    sums: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    grads: InputGradients,
) -> None:
    """Write the gradient of some heads' queries; add to the gradients of their keys and values, and of the tables.

    Shapes: as for `_attend`; d_out (b, e, HW), divided by sums; shifts, sums (b, 1, HW); a gradient as its input.
    """
    dq, dk, dv, d_rel_height, d_rel_width = grads
    lines = _by_row(q, blocks.size), _by_column(q, blocks.size)
    rows, columns = _relative_logits(*lines, rel_height, rel_width, blocks.size)
    d_rows, d_columns = torch.empty_like(rows), torch.empty_like(columns)
    values = v.transpose(1, 2) * (1 / _LOG2_E)  # logits, and so their gradients, are in units of ln 2
    of_keys, of_queries = (k, values, dk, dv), (d_out, shifts, sums, q, rows, columns, dq, d_rows, d_columns)
    for (k_, v_, dk_, dv_), (d_out_, shifts_, sums_, q_, rows_, columns_, dq_, *d_lines) in blocks.split(
        of_keys, of_queries
    ):
        weights = blocks.logits(q_, k_, rows_, columns_).sub_(shifts_).exp2_()  # times sums
        dv_.baddbmm_(d_out_, weights.transpose(1, 2))
        d_logits = torch.bmm(v_, d_out_, out=blocks.like(weights)).mul_(weights)
        d_logits.addcmul_(weights, d_logits.sum(1, keepdim=True).div_(sums_), value=-1)
        torch.baddbmm(dq_, k_, d_logits, beta=0, alpha=blocks.scale, out=dq_)
        dk_.baddbmm_(q_, d_logits.transpose(1, 2), alpha=blocks.scale)
        for d_line, across in zip(d_lines, (2, 1), strict=True):
            torch.sum(d_logits.unflatten(1, blocks.size), across, out=d_line)
    _relative_logits_backward(
        d_rows, d_columns, *lines, rel_height, rel_width, blocks.size, dq, d_rel_height, d_rel_width
    )


class _Blocks:
    """Partition of the work into blocks of logits, and the memory that the blocks share.

    A part is as many heads as have relative logits of `block_bytes`. A block is several heads of a part, or, where one
    head does not fit `block_bytes`, some queries of one head.
    """

    def __init__(self, q: Tensor, size: Size, scale: float, block_bytes: int) -> None:
        self.size, self.scale = size, scale
        self.buffers = _kept.buffers(q)
        self.total, _, positions = q.shape
        numbers = block_bytes // q.element_size()
        self.heads = _share(self.total, numbers // positions**2)
        self.queries = min(positions, -(-_share(positions, max(16, numbers // positions)) // 16) * 16)
        per_part = _share(self.total, numbers // (positions * sum(size)))
        self.heads_per_part = -(-per_part // self.heads) * self.heads

    def parts(self) -> Iterator[slice]:
        return (slice(start, start + self.heads_per_part) for start in range(0, self.total, self.heads_per_part))

    def split(self, of_keys: tuple[Tensor, ...], of_queries: tuple[Tensor, ...]) -> Iterator[tuple[tuple, tuple]]:
        """Both groups of tensors, block by block. Both are cut along heads, the second along queries too."""
        heads = (zip(*(t.split(self.heads) for t in tensors), strict=True) for tensors in (of_keys, of_queries))
        for keys, queries in zip(*heads, strict=True):
            for block in zip(*(t.split(self.queries, -1) for t in queries), strict=True):
                yield keys, block

    def logits(self, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits of some queries with all keys, in the first buffer.

        Shapes: q (b, d, queries); k (b, d, HW); rows (b, H, queries); columns (b, W, queries); result (b, HW, queries).
        """
        block = self.buffers.view(0, q.shape[0], k.shape[2], q.shape[2])
        torch.add(rows.unsqueeze(2), columns.unsqueeze(1), out=block.unflatten(1, self.size))
        return block.baddbmm_(k.transpose(1, 2), q, alpha=self.scale)

    def like(self, block: Tensor) -> Tensor:
        """The second buffer, shaped like a block."""
        return self.buffers.view(1, *block.shape)


class _Buffers:
    """Two pieces of memory that grow to the size of the largest request."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self.dtype, self.device = dtype, device
        self.places: list[Tensor | None] = [None, None]

    def view(self, which: int, *shape: int) -> Tensor:
        place, needed = self.places[which], math.prod(shape)
        if place is None or place.numel() < needed:
            with torch.inference_mode(False):  # else training could not write into it later
                place = self.places[which] = torch.empty(needed, dtype=self.dtype, device=self.device)
        return place[:needed].view(shape)


class _Kept(threading.local):
    """Buffers of one thread, by dtype."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, _Buffers] = {}

    def buffers(self, like: Tensor) -> _Buffers:
        if type(like) is not Tensor or like.device.type != "cpu":
            return _Buffers(like.dtype, like.device)
        return self.by_dtype.setdefault(like.dtype, _Buffers(like.dtype, "cpu"))


_kept = _Kept()


def free_blocks() -> None:
    """Free the memory that this thread keeps for its next call."""
    _kept.by_dtype.clear()


def _share(total: int, fitting: int) -> int:
    """Size of equal shares of `total`, each at most `fitting`, and at least 1."""
    shares = -(-total // max(1, fitting))
    return max(1, -(-total // max(1, shares)))


def _relative_logits(
    by_row: Tensor, by_column: Tensor, rel_height: Tensor, rel_width: Tensor, size: Size
) -> tuple[Tensor, Tensor]:
    """Products of queries with the tables, for each absolute row and each absolute column of the keys.

    Shapes: queries (H, d, b W) and (W, d, b H); tables (H, H, d) and (W, W, d); result (b, H, HW) and (b, W, HW).
    """
    return _from_rows(torch.bmm(rel_height, by_row), size), _from_columns(torch.bmm(rel_width, by_column), size)


def _relative_logits_backward(
    d_rows: Tensor,
    d_columns: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    size: Size,
    dq: Tensor,
    d_rel_height: Tensor,
    d_rel_width: Tensor,
) -> None:
    """Add the relative logits' part to the gradients of the queries and of the tables. Shapes: as forward."""
    d_rows, d_columns = _by_row(d_rows, size), _by_column(d_columns, size)
    d_rel_height.baddbmm_(d_rows, by_row.transpose(1, 2))
    d_rel_width.baddbmm_(d_columns, by_column.transpose(1, 2))
    dq += _from_rows(torch.bmm(rel_height.transpose(1, 2), d_rows), size)
    dq += _from_columns(torch.bmm(rel_width.transpose(1, 2), d_columns), size)


def _by_row(maps: Tensor, size: Size) -> Tensor:
    """One matrix for each row of the map. Shapes: (b, c, HW) to (H, c, b W)."""
    return maps.unflatten(2, size).permute(2, 1, 0, 3).flatten(2)


def _by_column(maps: Tensor, size: Size) -> Tensor:
    """One matrix for each column of the map. Shapes: (b, c, HW) to (W, c, b H)."""
    return maps.unflatten(2, size).permute(3, 1, 0, 2).flatten(2)


def _from_rows(lines: Tensor, size: Size) -> Tensor:
    """Inverse of `_by_row`. Shapes: (H, c, b W) to (b, c, HW)."""
    return lines.unflatten(2, (-1, size[1])).permute(2, 1, 0, 3).flatten(2)


def _from_columns(lines: Tensor, size: Size) -> Tensor:
    """Inverse of `_by_column`. Shapes: (W, c, b H) to (b, c, HW)."""
    return lines.unflatten(2, (-1, size[0])).permute(2, 1, 3, 0).flatten(2)


def _with_ones(v: Tensor) -> Tensor:
    """Append a channel of ones. Shapes: (B, e, HW) to (B, e + 1, HW)."""
    return F.pad(v, (0, 0, 0, 1), value=1.0)


def _channels_first(maps: Tensor) -> Tensor:
    """Shapes: (N, heads, H, W, c) to (N heads, c, HW); a view where the map is dense and channels first."""
    return maps.movedim(-1, 2).flatten(3).flatten(0, 1).contiguous()
