"""2-D relative positions: tables, logits, resizing.

AA (Bello et al., arXiv 1904.09925, section 3.2): S_W[i, j] = q_i . r^W[x_j - x_i] and S_H[i, j] = q_i . r^H[y_j - y_i],
with r^W of 2W-1 and r^H of 2H-1 rows, learned, shared by the heads of a layer.  [paper]
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def table_rows(size: int) -> int:
    """Rows of a table for an axis of `size` positions: one for each offset from -(size - 1) to size - 1."""
    return 2 * size - 1


def resize_table(table: Tensor, size: int) -> Tensor:
    """Resize a table to another map size by linear interpolation over the offsets. [ours]

    The largest offsets keep their rows, and so does offset 0. A table of the right size is resized, too, under
    torch.compile, to the same values: a branch for it would compile anew for every map size that has a table.

    Shapes: table (2 S - 1, d) to (2 size - 1, d).
    """
    rows = table_rows(size)
    if not _keeps_sizes_open() and rows == table.shape[0]:
        return table
    if rows == 1:
        middle = table.shape[0] // 2
        return table[middle : middle + 1]
    # Of a map of height 1, since torch's gradient of one-dimensional interpolation has no deterministic form on CUDA.
    columns = table.t()[None, :, None]  # 1, d, 1, 2 S - 1
    return F.interpolate(columns, size=(1, rows), mode="bilinear", align_corners=True)[0, :, 0].t()


def _keeps_sizes_open() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def by_position(table: Tensor, size: int) -> Tensor:
    """Rows of the table by absolute positions: entry (i, j) is the row for the offset j - i.

    Shapes: table (2 S - 1, d), resized where S is not `size`, to (size, size, d).
    """
    windows = resize_table(table, size).unfold(0, size, 1)  # window w: the rows for offsets w - (size - 1) to w
    return windows.flip(0).transpose(1, 2)


def relative_logits(q: Tensor, rel_height: Tensor, rel_width: Tensor) -> tuple[Tensor, Tensor]:
    """Relative logits of every query with each absolute row, and with each absolute column, of the keys.

    S_H + S_W of a pair (i, j) is rows[i, y_j] + columns[i, x_j].

    Shapes: q (N, heads, H, W, d); tables (2 S - 1, d); result (N, heads, H, W, H) and (N, heads, H, W, W).
    """
    height, width = q.shape[2:4]
    rows = _line_logits(q.movedim(2, 0), by_position(rel_height, height)).movedim(0, 2)
    columns = _line_logits(q.movedim(3, 0), by_position(rel_width, width)).movedim(0, 3)
    return rows, columns


def _line_logits(q: Tensor, table: Tensor) -> Tensor:
    """Products of each line's queries with the table for that line. Shapes: (S, ..., d), (S, S, d) to (S, ..., S)."""
    return torch.bmm(q.flatten(1, -2), table.transpose(1, 2)).unflatten(1, q.shape[1:-1])
