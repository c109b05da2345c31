"""The attention core of AA in blocks that stay in a processor's cache: exact, memory O(HW), made for CPUs.

Same function as `augment_cli.layers.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).

How it is arranged, and why:

- Maps stay channels first, (N heads, channels, HW), as a 1x1 convolution leaves them, and a block of logits is laid out
  keys x queries. Every product then has one of the two forms that a BLAS runs fast on matrices this thin, the sums over
  keys run along contiguous memory, and the result comes out channels first.
- The relative logits are written into the block first, and the product of keys and queries is added to them.
- Logits are in powers of two (the query carries the factor log2 e), because exp2 is several times faster than exp.
- A row of ones under v gives the sum of the weights with the product that uses them; the result is divided, not the
  weights.
- The largest logit is subtracted only where a bound on the logits does not already rule out an overflow.
- The backward pass makes each block again from the saved log-sum-exp.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function

from augment_cli.layers.relative import by_position

BLOCK_BYTES = 1_600_000
"""A thread's share of one block of logits. Measured: best a little above a 1 MiB second-level cache, flat to twice."""

_LOG2_E = math.log2(math.e)
_SAFE_EXPONENT = 60.0  # 2^60, times a million keys, times values up to 2^40, is below the largest float32
_WAY_OUT = "use augment_cli.layers.attention.relative_attention, which computes the same from differentiable operations"


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
    size = (height, width) = q.shape[2:4]
    block_bytes = block_bytes or BLOCK_BYTES * torch.get_num_threads()
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scaled = q.to(dtype) * (q.shape[-1] ** -0.5 * _LOG2_E)
        maps = (_channels_first(t.to(dtype)) for t in (scaled, k, v))
        tables = (by_position(t.to(dtype), s) for t, s in ((rel_height, height), (rel_width, width)))
        out, _ = _Attention.apply(*maps, *tables, size, block_bytes)
    return out.view(*q.shape[:2], v.shape[-1], height, width).movedim(2, -1).to(v.dtype)


class _Attention(Function):
    """Attention of prepared maps: the query scaled by log2(e) d^(-1/2), tables in absolute positions.

    Shapes: q, k (B, d, HW); v (B, e, HW); tables (H, H, d) and (W, W, d); result (B, e, HW) and the base-2 log-sum-exp
    of the logits (B, 1, HW).
    """

    @staticmethod
    def forward(q, k, v, rel_height, rel_width, size, block_bytes):
        out, lse = torch.empty_like(v), torch.empty_like(v[:, :1])
        blocks = _Blocks(q, size, block_bytes)
        for part in blocks.parts():
            _attend(*(t[part] for t in (q, k, v)), rel_height, rel_width, blocks, out[part], lse[part])
        return out, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.size, ctx.block_bytes = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, d_out, _):
        with torch.autocast(d_out.device.type, enabled=False):
            return *_Gradients.apply(d_out, *ctx.saved_tensors, ctx.size, ctx.block_bytes), None, None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        raise RuntimeError(f"blocked attention has no rule for torch.func.vmap; {_WAY_OUT}")

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f"blocked attention has no forward-mode derivative; {_WAY_OUT}")


class _Gradients(Function):
    """Gradients of `_Attention`: a Function of its own, so that asking for second derivatives gets a clear answer."""

    @staticmethod
    def forward(d_out, q, k, v, rel_height, rel_width, out, lse, size, block_bytes):
        grads = torch.empty_like(q), *(torch.zeros_like(t) for t in (k, v, rel_height, rel_width))
        # The row under d_out meets the row of ones under v: their product is dP - delta in one go.
        d_out = torch.cat([d_out, -(d_out * out).sum(1, keepdim=True)], dim=1)
        blocks = _Blocks(q, size, block_bytes)
        for part in blocks.parts():
            maps = (t[part] for t in (d_out, lse, q, k, v))
            _attend_backward(*maps, rel_height, rel_width, blocks, *(t[part] for t in grads[:3]), *grads[3:])
        return grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"blocked attention has no second derivatives; {_WAY_OUT}")

    vmap = _Attention.vmap
    jvp = _Attention.jvp


def _attend(q, k, v, rel_height, rel_width, blocks, out, lse) -> None:
    """Write the result and the log-sum-exp of some heads.

    Shapes: q, k (b, d, HW); v, out (b, e, HW); lse (b, 1, HW); tables (H, H, d) and (W, W, d).
    """
    rows, columns = _relative_logits(q, rel_height, rel_width, blocks.size)
    bounded = _bound(q, k, rows, columns) < _SAFE_EXPONENT
    of_keys, of_queries = (k, _with_ones(v)), (q, rows, columns, out, lse)
    for (k_, v_), (q_, rows_, columns_, out_, lse_) in blocks.split(of_keys, of_queries):
        block = blocks.logits(q_, k_, rows_, columns_)
        if not bounded:
            highest = block.amax(1, keepdim=True)
            block.sub_(highest)
        sums = torch.bmm(v_, block.exp2_())  # b, e + 1, queries
        torch.div(sums[:, :-1], sums[:, -1:], out=out_)
        torch.log2(sums[:, -1:], out=lse_)
        if not bounded:
            lse_.add_(highest)


def _attend_backward(d_out, lse, q, k, v, rel_height, rel_width, blocks, dq, dk, dv, d_rel_height, d_rel_width) -> None:
    """Write the gradient of some heads' queries; add to those of their keys and values, and of the tables.

    Shapes: as for `_attend`; d_out (b, e + 1, HW), its last row -delta; gradients as what they are of.
    """
    rows, columns = _relative_logits(q, rel_height, rel_width, blocks.size)
    d_rows, d_columns = torch.empty_like(rows), torch.empty_like(columns)
    weighted = _with_ones(v).mul_(1 / _LOG2_E).transpose(1, 2)  # logits are in units of ln 2: so are their gradients
    of_keys, of_queries = (k, weighted, dk, dv), (d_out, q, rows.sub_(lse), columns, dq, d_rows, d_columns)
    for (k_, v_, dk_, dv_), (d_out_, q_, rows_, columns_, dq_, *d_lines) in blocks.split(of_keys, of_queries):
        weights = blocks.logits(q_, k_, rows_, columns_).exp2_()
        dv_.baddbmm_(d_out_[:, :-1], weights.transpose(1, 2))
        d_logits = torch.bmm(v_, d_out_, out=blocks.like(weights)).mul_(weights)
        torch.bmm(k_, d_logits, out=dq_)
        dk_.baddbmm_(q_, d_logits.transpose(1, 2))
        for d_line, across in zip(d_lines, (2, 1), strict=True):
            torch.sum(d_logits.unflatten(1, blocks.size), across, out=d_line)
    _relative_logits_backward(d_rows, d_columns, q, rel_height, rel_width, blocks.size, dq, d_rel_height, d_rel_width)


class _Blocks:
    """How the work is cut, and the memory that the blocks share.

    Heads are taken in parts whose relative logits fit `block_bytes`; of a part, a block of logits takes several heads,
    or, where not even one head fits, some queries of one head.
    """

    def __init__(self, q: Tensor, size: tuple[int, int], block_bytes: int) -> None:
        self.size = size
        self.buffers = [q.new_empty(0), q.new_empty(0)]
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
        block = self._view(0, q.shape[0], k.shape[2], q.shape[2])
        torch.add(rows.unsqueeze(2), columns.unsqueeze(1), out=block.unflatten(1, self.size))
        return block.baddbmm_(k.transpose(1, 2), q)

    def like(self, block: Tensor) -> Tensor:
        """The second buffer, in the shape of a block."""
        return self._view(1, *block.shape)

    def _view(self, which: int, *shape: int) -> Tensor:
        needed = math.prod(shape)
        if self.buffers[which].numel() < needed:
            self.buffers[which] = self.buffers[which].new_empty(needed)
        return self.buffers[which][:needed].view(shape)


def _share(total: int, fitting: int) -> int:
    """The size of equal shares of `total`, none above `fitting`; at least 1."""
    shares = -(-total // max(1, fitting))
    return max(1, -(-total // max(1, shares)))


def _bound(q, k, rows, columns) -> float:
    """At least the magnitude of every logit: |q . k| <= |q| |k|."""
    squares = (t.square().sum(1).amax().item() for t in (q, k))
    ends = (end for t in (rows, columns) for end in t.aminmax())
    lowest_row, highest_row, lowest_column, highest_column = (end.item() for end in ends)
    content = math.sqrt(math.prod(squares))
    return content + max(-lowest_row, highest_row) + max(-lowest_column, highest_column)


def _relative_logits(q, rel_height, rel_width, size) -> tuple[Tensor, Tensor]:
    """Shapes: q (b, d, HW); tables (H, H, d) and (W, W, d); result (b, H, HW) and (b, W, HW)."""
    rows = _from_rows(torch.bmm(rel_height, _by_row(q, size)), size)
    columns = _from_columns(torch.bmm(rel_width, _by_column(q, size)), size)
    return rows, columns


def _relative_logits_backward(d_rows, d_columns, q, rel_height, rel_width, size, dq, d_rel_height, d_rel_width) -> None:
    """Add the gradients that come through the relative logits to those of the query and of the tables."""
    d_rows, d_columns = _by_row(d_rows, size), _by_column(d_columns, size)
    d_rel_height.baddbmm_(d_rows, _by_row(q, size).transpose(1, 2))
    d_rel_width.baddbmm_(d_columns, _by_column(q, size).transpose(1, 2))
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
    return torch.cat([v, torch.ones_like(v[:, :1])], dim=1)


def _channels_first(maps: Tensor) -> Tensor:
    """Shapes: (N, heads, H, W, c) to (N heads, c, HW); a view of a dense channels-first map."""
    return maps.movedim(-1, 2).flatten(3).flatten(0, 1).contiguous()
