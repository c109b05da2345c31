"""The attention core of AA in blocks that stay in a processor's cache: exact, memory O(HW), made for CPUs.

Same function as `augment_cli.layers.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).

How it is arranged, and why:

- Maps stay channels first, (N heads, channels, HW), as a 1x1 convolution leaves them, and a block of logits is laid out
  keys x queries. Every product then has one of the two forms that a BLAS runs fast on matrices this thin, the sums over
  keys run along contiguous memory, and the result comes out channels first.
- The relative logits are written into the block first, and the product of keys and queries is added to them.
- Logits are in powers of two (multiplied by log2 e), because exp2 is several times faster than exp. The factor and
  d^(-1/2) ride on the product of keys and queries and on the tables, so that no map is scaled.
- A row of ones under v gives the sum of the weights with the product that uses them; the result is divided, not the
  weights.
- The largest logit of a query is looked for and subtracted only if the sums of the weights, looked at afterwards, show
  that it has to be: the sums tell exactly, at a hundredth of the cost of looking for it.
- The backward pass makes each block again. A query's weights are 2^(logit - shift) / sum, and shift and sum are kept
  apart: one float32 log-sum-exp of magnitude 10^8 is rounded to a multiple of 8, which would make the weights wrong by
  factors. Subtracted from a weight's gradient is the weighted mean of the same numbers, so that where one key has all
  the weight the gradient of its logit is zero, and not a rounding error that the queries multiply.
- Blocks are made in a place that a thread keeps: fresh memory has to be given to the process page by page, which can
  take longer than the arithmetic. Two blocks of the largest call so far are kept; `free_blocks` gives them back.
"""

import math
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from augment_cli.layers.dispatch import operator
from augment_cli.layers.first_order import FirstOrder, Gradients, has_tangents
from augment_cli.layers.relative import by_position

BLOCK_BYTES = 1_600_000
"""A thread's share of one block of logits. Measured: best a little above a 1 MiB second-level cache, flat to twice."""

_LOG2_E = math.log2(math.e)
_SAFE_SUM = 2.0**60
"""Of the weights of a query, and its inverse: values up to 2^40 times it are far below the largest float32, and what is
rounded to zero beside its inverse does not count."""


def blocked_relative_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor, *, block_bytes: int | None = None
) -> Tensor:
    """Attention of every position to every other, by blocks of logits of at most about `block_bytes`.

    By default a block has BLOCK_BYTES for each of torch's threads, which share it.

    Half-precision inputs are computed in float32, the result has v's type, and autocast changes nothing. Gradients of
    first order only, by `backward` or `torch.func.grad`; `torch.func.vmap`, forward mode and second derivatives raise a
    RuntimeError.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return blocked_relative_attention(q, k, v, rel_height, rel_width, block_bytes=block_bytes)
    size = (height, width) = q.shape[2:4]
    block_bytes = block_bytes or BLOCK_BYTES * torch.get_num_threads()
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 * _LOG2_E
    maps = (_channels_first(t.to(dtype)) for t in (q, k, v))
    tables = (by_position(t.to(dtype) * scale, s) for t, s in ((rel_height, height), (rel_width, width)))
    inputs = *maps, *tables, size, scale, block_bytes
    if torch.is_grad_enabled() or has_tangents(q, k, v, rel_height, rel_width):
        out, _, _ = _Attention.apply(*inputs)
    else:  # nothing to gain by a Function, whose call takes as long as one of the products here
        out, _, _ = _attention(*inputs)
    return out.view(*q.shape[:2], v.shape[-1], height, width).movedim(2, -1).to(v.dtype)


class _Attention(FirstOrder):
    """Attention of prepared maps: `scale` is log2(e) d^(-1/2), tables in absolute positions and scaled by it.

    Shapes: q, k (B, d, HW); v (B, e, HW); tables (H, H, d) and (W, W, d); result (B, e, HW); shifts and sums
    (B, 1, HW).
    """

    @staticmethod
    def forward(q, k, v, rel_height, rel_width, size, scale, block_bytes):
        return _attention(q, k, v, rel_height, rel_width, size, scale, block_bytes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.size, ctx.scale, ctx.block_bytes = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, d_out, *_):
        with torch.autocast(d_out.device.type, enabled=False):
            gradients = _Gradients.apply if torch.is_grad_enabled() else _attention_backward
            settings = ctx.size, ctx.scale, ctx.block_bytes
            return *gradients(d_out, *ctx.saved_tensors, *settings), None, None, None


class _Gradients(Gradients):
    """Gradients of `_Attention`."""

    @staticmethod
    def forward(*inputs):
        return _attention_backward(*inputs)


def _run(q, k, v, rel_height, rel_width, size, scale, block_bytes) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and of every query the base-2 logit that its weights are relative to, and the sum of these.

    Shapes: as for `_Attention`.
    """
    maps = q, k, _with_ones(v)
    sums = torch.empty_like(maps[2])
    out, total = sums[:, :-1], sums[:, -1:]
    blocks = _Blocks(q, size, scale, block_bytes)
    for part in blocks.parts():
        _attend(*(t[part] for t in maps), rel_height, rel_width, blocks, sums[part])
    if not total.numel() or _is_safe(total):
        mantissas, exponents = total.frexp()
        return out / total, exponents.to(total.dtype), mantissas
    peaks = torch.empty_like(total)
    for part in blocks.parts():
        _attend(*(t[part] for t in maps), rel_height, rel_width, blocks, sums[part], peaks[part])
    return out / total, peaks, total.contiguous()


def _run_backward(d_out, q, k, v, rel_height, rel_width, shifts, sums, size, scale, block_bytes) -> tuple[Tensor, ...]:
    """Gradients of the five inputs. Shapes: as for `_Attention`."""
    grads = torch.empty_like(q), *(torch.zeros_like(t) for t in (k, v, rel_height, rel_width))
    d_out = d_out / sums
    blocks = _Blocks(q, size, scale, block_bytes)
    for part in blocks.parts():
        maps = (t[part] for t in (d_out, shifts, sums, q, k, v))
        _attend_backward(*maps, rel_height, rel_width, blocks, *(t[part] for t in grads[:3]), *grads[3:])
    return grads


def _results(q, k, v, *_) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(v), torch.empty_like(q[:, :1]), torch.empty_like(q[:, :1])


def _gradient_results(d_out, q, k, v, rel_height, rel_width, *_) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (q, k, v, rel_height, rel_width))


def _flops(q_shape, k_shape, v_shape, height_shape, width_shape, *_, **__) -> int:
    """Products of queries with keys and with rows of the tables, and of weights with values."""
    heads, d, positions = q_shape
    return 2 * heads * positions * (positions * (d + v_shape[1]) + (height_shape[0] + width_shape[0]) * d)


def _backward_flops(d_out_shape, *inputs, **_) -> int:
    """A product has two in its derivative. What the blocks make again is not counted."""
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


def _attend(q, k, v, rel_height, rel_width, blocks, sums, peaks=None) -> None:
    """Write the weighted sums of some heads' values, and below them of ones; and, where asked, the largest logits.

    With the largest logits, weights are relative to them.

    Shapes: q, k (b, d, HW); v, sums (b, e + 1, HW); peaks (b, 1, HW); tables (H, H, d) and (W, W, d).
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
    d_out, shifts, sums, q, k, v, rel_height, rel_width, blocks, dq, dk, dv, d_rel_height, d_rel_width
) -> None:
    """Write the gradient of some heads' queries; add to those of their keys and values, and of the tables.

    Shapes: as for `_attend`; d_out (b, e, HW), divided by sums; shifts, sums (b, 1, HW); gradients as what they are of.
    """
    lines = _by_row(q, blocks.size), _by_column(q, blocks.size)
    rows, columns = _relative_logits(*lines, rel_height, rel_width, blocks.size)
    d_rows, d_columns = torch.empty_like(rows), torch.empty_like(columns)
    values = v.transpose(1, 2) * (1 / _LOG2_E)  # logits are in units of ln 2: so are their gradients
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
    """How the work is cut, and the memory that the blocks share.

    Heads are taken in parts whose relative logits fit `block_bytes`; of a part, a block of logits takes several heads,
    or, where not even one head fits, some queries of one head.
    """

    def __init__(self, q: Tensor, size: tuple[int, int], scale: float, block_bytes: int) -> None:
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
        """The two groups of tensors for one block after the other; the second group is cut along queries too."""
        heads = (zip(*(t.split(self.heads) for t in tensors), strict=True) for tensors in (of_keys, of_queries))
        for keys, queries in zip(*heads, strict=True):
            for block in zip(*(t.split(self.queries, -1) for t in queries), strict=True):
                yield keys, block

    def logits(self, q: Tensor, k: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits of some queries, in the first buffer.

        Shapes: q (b, d, queries); k (b, d, HW); rows (b, H, queries); columns (b, W, queries); result (b, HW, queries).
        """
        block = self.buffers.view(0, q.shape[0], k.shape[2], q.shape[2])
        torch.add(rows.unsqueeze(2), columns.unsqueeze(1), out=block.unflatten(1, self.size))
        return block.baddbmm_(k.transpose(1, 2), q, alpha=self.scale)

    def like(self, block: Tensor) -> Tensor:
        """The second buffer, in the shape of a block."""
        return self.buffers.view(1, *block.shape)


class _Buffers:
    """Two places that grow to what is asked of them."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        self.options = {"dtype": dtype, "device": device}
        self.places: list[Tensor | None] = [None, None]

    def view(self, which: int, *shape: int) -> Tensor:
        place, needed = self.places[which], math.prod(shape)
        if place is None or place.numel() < needed:
            with torch.inference_mode(False):  # or only inference could write into it later
                place = self.places[which] = torch.empty(needed, **self.options)
        return place[:needed].view(shape)


class _Kept(threading.local):
    """Buffers of one thread, by type of number."""

    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, _Buffers] = {}

    def buffers(self, like: Tensor) -> _Buffers:
        if type(like) is not Tensor or like.device.type != "cpu":
            return _Buffers(like.dtype, like.device)
        return self.by_dtype.setdefault(like.dtype, _Buffers(like.dtype, "cpu"))


_kept = _Kept()


def free_blocks() -> None:
    """Give back the memory that this thread keeps for its next call."""
    _kept.by_dtype.clear()


def _share(total: int, fitting: int) -> int:
    """The size of equal shares of `total`, none above `fitting`; at least 1."""
    shares = -(-total // max(1, fitting))
    return max(1, -(-total // max(1, shares)))


def _relative_logits(by_row, by_column, rel_height, rel_width, size) -> tuple[Tensor, Tensor]:
    """Shapes: queries (H, d, b W) and (W, d, b H); tables (H, H, d) and (W, W, d); result (b, H, HW) and (b, W, HW)."""
    return _from_rows(torch.bmm(rel_height, by_row), size), _from_columns(torch.bmm(rel_width, by_column), size)


def _relative_logits_backward(
    d_rows, d_columns, by_row, by_column, rel_height, rel_width, size, dq, d_rel_height, d_rel_width
) -> None:
    """Add the gradients that come through the relative logits to those of the query and of the tables."""
    d_rows, d_columns = _by_row(d_rows, size), _by_column(d_columns, size)
    d_rel_height.baddbmm_(d_rows, by_row.transpose(1, 2))
    d_rel_width.baddbmm_(d_columns, by_column.transpose(1, 2))
    dq += _from_rows(torch.bmm(rel_height.transpose(1, 2), d_rows), size)
    dq += _from_columns(torch.bmm(rel_width.transpose(1, 2), d_columns), size)


def _by_row(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """One matrix for each row of the map. Shapes: (b, c, HW) to (H, c, b W)."""
    return maps.unflatten(2, size).permute(2, 1, 0, 3).flatten(2)


def _by_column(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """One matrix for each column of the map. Shapes: (b, c, HW) to (W, c, b H)."""
    return maps.unflatten(2, size).permute(3, 1, 0, 2).flatten(2)


def _from_rows(lines: Tensor, size: tuple[int, int]) -> Tensor:
    """What `_by_row` took. Shapes: (H, c, b W) to (b, c, HW)."""
    return lines.unflatten(2, (-1, size[1])).permute(2, 1, 0, 3).flatten(2)


def _from_columns(lines: Tensor, size: tuple[int, int]) -> Tensor:
    """What `_by_column` took. Shapes: (W, c, b H) to (b, c, HW)."""
    return lines.unflatten(2, (-1, size[0])).permute(2, 1, 3, 0).flatten(2)


def _with_ones(v: Tensor) -> Tensor:
    return F.pad(v, (0, 0, 0, 1), value=1.0)


def _channels_first(maps: Tensor) -> Tensor:
    """Shapes: (N, heads, H, W, c) to (N heads, c, HW); a view of a dense channels-first map."""
    return maps.movedim(-1, 2).flatten(3).flatten(0, 1).contiguous()
