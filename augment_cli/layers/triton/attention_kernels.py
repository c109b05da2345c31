"""The attention core of AA (Bello et al., arXiv 1904.09925, section 3.2) as Triton kernels, forward and backward.

    logit[i, j] = q_i . (k_j + rel_height[y_j - y_i + H - 1] + rel_width[x_j - x_i + W - 1])
    weight      = 2^((logit - shift) / sqrt(d) log2(e)) / sum,   out_i = sum_j weight[i, j] v_j

for each of N samples and heads, with d key channels and e value channels, on a map of H x W positions. B is N heads.

- The map is cut into tiles of queries, QY rows of QX positions, and tiles of keys, KY rows of KX positions. Between two
  tiles there are QY + KY - 1 different row offsets, and QX + KX - 1 column offsets. So the relative logits of a pair of
  tiles are picked from two products of its queries with a window of each table, of PY and PX rows. No relative logit is
  ever in global memory.
- The forward pass is one kernel, for a tile of queries, over all tiles of keys. The backward pass has two that form the
  logits again: `queries_backward` for a tile of queries gives d_q, and `keys_backward` for a tile of keys gives d_k and
  d_v. Each number is written by one program and summed in one order: there are no atomics, and results repeat bit for
  bit.
- The tables' gradients are sums over all pairs of tiles. In `queries_backward` the loop over columns of tiles is the
  outer one, so a program's sums for one window of rel_width are complete when the column is done. In `keys_backward`
  the loop over rows is the outer one, for rel_height. The programs' sums, (B, tiles, windows, P, d) in float32, are
  added up afterwards: over B and the tiles on the other axis by torch, and where windows overlap by `table_backward`.
- Shift, a query's largest logit, and sum are separate numbers, and logits are scaled after the shift is subtracted: one
  float32 log-sum-exp of magnitude 10^8 would be rounded to a multiple of 8. The three kernels form logits by the same
  products of the same shapes, so that they get the same bits.
- Where one key has all the weight, out is its v, and the gradient of its logit, the difference of d_out . v and
  d_out . out, is to be exactly zero. So d_out . out is the diagonal of a product of the same shape as d_out . v.
"""

import triton
import triton.language as tl

from augment_cli.layers.triton.product import product

SIZES = ["heads", "height"]
"""Arguments whose values make no faster code: maps of many sizes, as in detection, need fewer compilations."""


@triton.jit
def _positions(tile_y, tile_x, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Positions of a tile whose first one is (tile_y, tile_x), and whether they are on the map: (T,), (T,)."""
    i = tl.arange(0, ROWS * COLUMNS)
    y, x = tile_y + i // COLUMNS, tile_x + i % COLUMNS
    return y * width + x, (y < height) & (x < width)


@triton.jit
def _load(maps, at, inside, channel_step, position_step, C: tl.constexpr, PADDED: tl.constexpr, ALIGNED: tl.constexpr):
    """Channels of a tile's positions, zeros beside the map: (T, PADDED). ALIGNED divides the place of each position."""
    c, first = tl.arange(0, PADDED), at.to(tl.int64) * position_step
    if ALIGNED > 1:
        first = tl.multiple_of(first, ALIGNED)
    places = first[:, None] + c[None, :] * channel_step
    return tl.load(maps + places, mask=inside[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _of_head(maps, n, h, sample_step, head_step, ALIGNED: tl.constexpr):
    """Where a head's map of one sample begins."""
    first = n * sample_step + h * head_step
    if ALIGNED > 1:
        first = tl.multiple_of(first, ALIGNED)
    return maps + first


@triton.jit
def _store(maps, at, inside, channel_step, values, C: tl.constexpr, PADDED: tl.constexpr):
    """Write a tile's values (T, PADDED) to a dense map, channels first."""
    c = tl.arange(0, PADDED)
    places = at[:, None] + c[None, :].to(tl.int64) * channel_step
    tl.store(maps + places, values.to(maps.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _window(table, size, offset, like, D: tl.constexpr, PADDED: tl.constexpr, Q: tl.constexpr, P: tl.constexpr):
    """Rows of a table (2 size - 1, d) for Q lines of queries, and keys from `offset` lines behind them: (P, PADDED).

    Row p is for the offset p + `offset` - (Q - 1), and zero where there is none.
    """
    row, c = offset + size - Q + tl.arange(0, P), tl.arange(0, PADDED)
    inside = (row >= 0) & (row < 2 * size - 1)
    rows = tl.load(table + row[:, None] * D + c[None, :], mask=inside[:, None] & (c < D)[None, :], other=0.0)
    return rows.to(like)


@triton.jit
def _by_line(products, of_query, lines, Q: tl.constexpr, K: tl.constexpr):
    """Products with a window, (T, P), to logits of K lines of keys, (T, K), of which the first `lines` are on the map:
    the others get -inf. of_query (T,) are the queries' lines.
    """
    line = tl.arange(0, K)[None, :]
    picked = tl.gather(products, line - of_query[:, None] + (Q - 1), axis=1)
    return tl.where(line < lines, picked, float("-inf"))


@triton.jit
def _by_offset(d_lines, of_query, Q: tl.constexpr, K: tl.constexpr, P: tl.constexpr):
    """Derivative of `_by_line`. Shapes: d_lines (T, K) to (T, P)."""
    line = tl.arange(0, P)[None, :] + of_query[:, None] - (Q - 1)
    inside = (line >= 0) & (line < K)
    T: tl.constexpr = d_lines.shape[0]
    repeated = tl.reshape(tl.broadcast_to(d_lines[:, None, :], (T, P // K, K)), (T, P))  # some compilers want one shape
    return tl.where(inside, tl.gather(repeated, tl.where(inside, line, 0), axis=1), 0.0)


@triton.jit
def _logits(q, k, rows, columns, PRECISION: tl.constexpr):
    """Logits before scaling (queries, keys). Shapes: rows (queries, KY), columns (queries, KX), whose -inf remain."""
    relative = tl.reshape(rows[:, :, None] + columns[:, None, :], (q.shape[0], k.shape[0]))
    return product(q, tl.trans(k), PRECISION, relative)


@triton.jit(do_not_specialize=SIZES)
def attention_forward(
    q, k, v, rel_height, rel_width, out, shifts, sums,
    q_n, q_h, q_c, q_p, k_n, k_h, k_c, k_p, v_n, v_h, v_c, v_p,
    heads, height, width, scale,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    ALIGNED_D: tl.constexpr, ALIGNED_E: tl.constexpr,
    QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries: out (B, e, HW), shifts and sums (B, HW). `scale` is d^(-1/2) log2(e)."""
    T: tl.constexpr = QY * QX
    across = tl.cdiv(width, QX)
    tiles = tl.cdiv(height, QY) * across
    task, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    tile_y, tile_x = tile // across * QY, tile % across * QX
    n, h = task // heads, task % heads
    q, k = _of_head(q, n, h, q_n, q_h, ALIGNED_D), _of_head(k, n, h, k_n, k_h, ALIGNED_D)
    v = _of_head(v, n, h, v_n, v_h, ALIGNED_E)
    at, inside = _positions(tile_y, tile_x, height, width, QY, QX)
    of_y, of_x = tl.arange(0, T) // QX, tl.arange(0, T) % QX

    queries = _load(q, at, inside, q_c, q_p, D, PADDED_D, ALIGNED_D)
    peaks = tl.full((T,), float("-inf"), tl.float32)
    totals = tl.zeros((T,), tl.float32)
    values = tl.zeros((T, PADDED_E), tl.float32)
    for x in range(0, width, KX):
        of_width = _window(rel_width, width, x - tile_x, queries.dtype, D, PADDED_D, QX, PX)
        columns = _by_line(product(queries, tl.trans(of_width), PRECISION), of_x, width - x, QX, KX)
        for y in range(0, height, KY):
            of_height = _window(rel_height, height, y - tile_y, queries.dtype, D, PADDED_D, QY, PY)
            rows = _by_line(product(queries, tl.trans(of_height), PRECISION), of_y, height - y, QY, KY)
            keys_at, keys_inside = _positions(y, x, height, width, KY, KX)
            keys = _load(k, keys_at, keys_inside, k_c, k_p, D, PADDED_D, ALIGNED_D)
            logits = _logits(queries, keys, rows, columns, PRECISION)
            higher = tl.maximum(peaks, tl.max(logits, 1))
            kept = tl.exp2((peaks - higher) * scale)
            weights = tl.exp2((logits - higher[:, None]) * scale)
            seen = _load(v, keys_at, keys_inside, v_c, v_p, E, PADDED_E, ALIGNED_E)
            totals = totals * kept + tl.sum(weights, 1)
            values = product(weights.to(seen.dtype), seen, PRECISION, values * kept[:, None])
            peaks = higher
    positions = height * width
    _store(out + task * E * positions, at, inside, positions, values / totals[:, None], E, PADDED_E)
    tl.store(shifts + task * positions + at, peaks, mask=inside)
    tl.store(sums + task * positions + at, totals, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def queries_backward(
    q, k, v, rel_height, rel_width, out, shifts, sums, d_out, deltas, d_q, d_windows,
    q_n, q_h, q_c, q_p, k_n, k_h, k_c, k_p, v_n, v_h, v_c, v_p,
    heads, height, width, scale, d_scale,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    ALIGNED_D: tl.constexpr, ALIGNED_E: tl.constexpr,
    QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries: d_q (B, d, HW), deltas (B, HW), and sums for rel_width, d_windows (B, tiles, windows, PX, d).

    d_out and out are dense, (B, e, HW). `d_scale` is d^(-1/2).
    """
    T: tl.constexpr = QY * QX
    across = tl.cdiv(width, QX)
    tiles = tl.cdiv(height, QY) * across
    task, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    tile_y, tile_x = tile // across * QY, tile % across * QX
    n, h = task // heads, task % heads
    q, k = _of_head(q, n, h, q_n, q_h, ALIGNED_D), _of_head(k, n, h, k_n, k_h, ALIGNED_D)
    v = _of_head(v, n, h, v_n, v_h, ALIGNED_E)
    at, inside = _positions(tile_y, tile_x, height, width, QY, QX)
    i = tl.arange(0, T)
    of_y, of_x = i // QX, i % QX
    positions = height * width

    queries = _load(q, at, inside, q_c, q_p, D, PADDED_D, ALIGNED_D)
    grads = _load(d_out + task * E * positions, at, inside, positions, 1, E, PADDED_E, 1)
    results = _load(out + task * E * positions, at, inside, positions, 1, E, PADDED_E, 1)
    products = product(grads, tl.trans(results), PRECISION)
    delta = tl.sum(tl.where(i[:, None] == i[None, :], products, 0.0), 1)
    tl.store(deltas + task * positions + at, delta, mask=inside)
    peaks = tl.load(shifts + task * positions + at, mask=inside, other=0.0)
    inverses = 1 / tl.load(sums + task * positions + at, mask=inside, other=1.0)

    d_queries = tl.zeros((T, PADDED_D), tl.float32)
    for x in range(0, width, KX):
        of_width = _window(rel_width, width, x - tile_x, queries.dtype, D, PADDED_D, QX, PX)
        columns = _by_line(product(queries, tl.trans(of_width), PRECISION), of_x, width - x, QX, KX)
        d_columns = tl.zeros((T, KX), tl.float32)
        for y in range(0, height, KY):
            of_height = _window(rel_height, height, y - tile_y, queries.dtype, D, PADDED_D, QY, PY)
            rows = _by_line(product(queries, tl.trans(of_height), PRECISION), of_y, height - y, QY, KY)
            keys_at, keys_inside = _positions(y, x, height, width, KY, KX)
            keys = _load(k, keys_at, keys_inside, k_c, k_p, D, PADDED_D, ALIGNED_D)
            logits = _logits(queries, keys, rows, columns, PRECISION)
            weights = tl.exp2((logits - peaks[:, None]) * scale) * inverses[:, None]
            seen = _load(v, keys_at, keys_inside, v_c, v_p, E, PADDED_E, ALIGNED_E)
            d_weights = product(grads, tl.trans(seen), PRECISION)
            d_logits = weights * (d_weights - delta[:, None])
            d_queries = product(d_logits.to(keys.dtype), keys, PRECISION, d_queries)
            d_lines = tl.reshape(d_logits, (T, KY, KX))
            d_columns += tl.sum(d_lines, 1)
            d_rows = _by_offset(tl.sum(d_lines, 2), of_y, QY, KY, PY)
            d_queries = product(d_rows.to(queries.dtype), of_height, PRECISION, d_queries)
        d_offsets = _by_offset(d_columns, of_x, QX, KX, PX).to(queries.dtype)
        d_queries = product(d_offsets, of_width, PRECISION, d_queries)
        d_window = product(tl.trans(d_offsets), queries, PRECISION) * d_scale
        _store_window(d_windows, (task * tiles + tile) * tl.cdiv(width, KX) + x // KX, d_window, D, PADDED_D, PX)
    _store(d_q + task * D * positions, at, inside, positions, d_queries * d_scale, D, PADDED_D)


@triton.jit(do_not_specialize=SIZES)
def keys_backward(
    q, k, v, rel_height, rel_width, shifts, sums, d_out, deltas, d_k, d_v, d_windows,
    q_n, q_h, q_c, q_p, k_n, k_h, k_c, k_p, v_n, v_h, v_c, v_p,
    heads, height, width, scale, d_scale,
    D: tl.constexpr, E: tl.constexpr, PADDED_D: tl.constexpr, PADDED_E: tl.constexpr,
    ALIGNED_D: tl.constexpr, ALIGNED_E: tl.constexpr,
    QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys: d_k (B, d, HW), d_v (B, e, HW), and sums for rel_height, d_windows (B, tiles, windows, PY, d)."""
    T: tl.constexpr = QY * QX
    KEYS: tl.constexpr = KY * KX
    across = tl.cdiv(width, KX)
    tiles = tl.cdiv(height, KY) * across
    task, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    tile_y, tile_x = tile // across * KY, tile % across * KX
    n, h = task // heads, task % heads
    q, k = _of_head(q, n, h, q_n, q_h, ALIGNED_D), _of_head(k, n, h, k_n, k_h, ALIGNED_D)
    v = _of_head(v, n, h, v_n, v_h, ALIGNED_E)
    at, inside = _positions(tile_y, tile_x, height, width, KY, KX)
    of_y, of_x = tl.arange(0, T) // QX, tl.arange(0, T) % QX
    positions = height * width

    keys = _load(k, at, inside, k_c, k_p, D, PADDED_D, ALIGNED_D)
    seen = _load(v, at, inside, v_c, v_p, E, PADDED_E, ALIGNED_E)
    d_keys = tl.zeros((KEYS, PADDED_D), tl.float32)
    d_values = tl.zeros((KEYS, PADDED_E), tl.float32)
    for y in range(0, height, QY):
        of_height = _window(rel_height, height, tile_y - y, keys.dtype, D, PADDED_D, QY, PY)
        d_window = tl.zeros((PY, PADDED_D), tl.float32)
        for x in range(0, width, QX):
            of_width = _window(rel_width, width, tile_x - x, keys.dtype, D, PADDED_D, QX, PX)
            queries_at, queries_inside = _positions(y, x, height, width, QY, QX)
            queries = _load(q, queries_at, queries_inside, q_c, q_p, D, PADDED_D, ALIGNED_D)
            grads = _load(d_out + task * E * positions, queries_at, queries_inside, positions, 1, E, PADDED_E, 1)
            peaks = tl.load(shifts + task * positions + queries_at, mask=queries_inside, other=0.0)
            inverses = 1 / tl.load(sums + task * positions + queries_at, mask=queries_inside, other=1.0)
            delta = tl.load(deltas + task * positions + queries_at, mask=queries_inside, other=0.0)
            columns = _by_line(product(queries, tl.trans(of_width), PRECISION), of_x, width - tile_x, QX, KX)
            rows = _by_line(product(queries, tl.trans(of_height), PRECISION), of_y, height - tile_y, QY, KY)
            logits = _logits(queries, keys, rows, columns, PRECISION)
            weights = tl.exp2((logits - peaks[:, None]) * scale) * inverses[:, None]
            weights = tl.where(queries_inside[:, None], weights, 0.0)
            d_values = product(tl.trans(weights.to(grads.dtype)), grads, PRECISION, d_values)
            d_weights = product(grads, tl.trans(seen), PRECISION)
            d_logits = weights * (d_weights - delta[:, None])
            d_keys = product(tl.trans(d_logits.to(queries.dtype)), queries, PRECISION, d_keys)
            d_rows = _by_offset(tl.sum(tl.reshape(d_logits, (T, KY, KX)), 2), of_y, QY, KY, PY)
            d_window = product(tl.trans(d_rows.to(queries.dtype)), queries, PRECISION, d_window)
        _store_window(
            d_windows, (task * tiles + tile) * tl.cdiv(height, QY) + y // QY, d_window * d_scale, D, PADDED_D, PY
        )
    _store(d_k + task * D * positions, at, inside, positions, d_keys * d_scale, D, PADDED_D)
    _store(d_v + task * E * positions, at, inside, positions, d_values, E, PADDED_E)


@triton.jit
def _store_window(d_windows, place, d_window, D: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr):
    """Write sums for a window (P, PADDED) to place `place` of d_windows (..., P, d)."""
    p, c = tl.arange(0, P), tl.arange(0, PADDED)
    inside = (c < D)[None, :] & (p >= 0)[:, None]
    tl.store(d_windows + place * P * D + p[:, None] * D + c[None, :], d_window, mask=inside)


@triton.jit(do_not_specialize=["size", "queries", "keys"])
def table_backward(
    sums, d_table, of_queries, of_keys, size, queries, keys,
    D: tl.constexpr, PADDED_D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A row of d_table (2 size - 1, d): its sums in the windows (`queries` tiles, `keys` tiles, P, d) that have it.

    `of_queries` and `of_keys` are the strides of `sums`. TILES is `queries`, rounded up to a power of two.
    """
    row, t, c = tl.program_id(0), tl.arange(0, TILES), tl.arange(0, PADDED_D)
    place = row - size + Q + Q * t  # in the window of tile 0 of keys
    first = (tl.maximum(place - (Q + K - 2), 0) + K - 1) // K  # tile of keys whose window has the row
    total = tl.zeros((PADDED_D,), tl.float32)
    for i in tl.static_range((Q + 2 * K - 2) // K):
        u = first + i
        p = place - K * u
        inside = (t < queries) & (u < keys) & (p >= 0)
        places = t[:, None] * of_queries + u[:, None] * of_keys + p[:, None] * D + c[None, :]
        total += tl.sum(tl.load(sums + places, mask=inside[:, None] & (c < D)[None, :], other=0.0), 0)
    tl.store(d_table + row * D + c, total.to(d_table.dtype.element_ty), mask=c < D)
