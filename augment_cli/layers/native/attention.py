"""Call the compiled attention kernel of AA, `attention_forward.cpp` and `attention_backward.cpp`."""

import ctypes

from torch import Tensor

from augment_cli.layers.native import Argument, Kernel, dense_samples, fields


class _Numbers(ctypes.Structure):
    """`struct Attention` in attention.h."""

    _fields_ = (
        *fields(ctypes.c_int, "batch heads d e height width"),
        ("scale", ctypes.c_float),
        *fields(ctypes.c_long, "q_step k_step v_step"),
    )


_forward_kernel = Kernel("attention_forward", _Numbers, tensors=8)
_backward_kernel = Kernel("attention_backward", _Numbers, tensors=14)

Results = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Results:
    """The result, and for each query the shift and the sum of its weights: weight = 2^(logit - shift) / sum.

    Shapes: q, k (N, heads, d, HW); v and result (N, heads, e, HW); tables (2 H - 1, d) and (2 W - 1, d); shifts and
    sums (N, heads, HW).
    """
    numbers, inputs = _arguments(q, k, v, rel_height, rel_width)
    results = empty_results(q, k, v)
    _forward_kernel(numbers, *inputs, *((t, t.shape) for t in results))
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
    """Gradients of the five inputs of `forward`, each in its input's shape."""
    numbers, inputs = _arguments(q, k, v, rel_height, rel_width)
    of_out = numbers.batch, numbers.heads, numbers.e, numbers.height * numbers.width
    of_queries = numbers.batch, numbers.heads, numbers.height * numbers.width
    given = (out, of_out), (shifts, of_queries), (sums, of_queries), (d_out, of_out)
    grads = empty_gradients(q, k, v, rel_height, rel_width)
    _backward_kernel(numbers, *inputs, *((t.contiguous(), shape) for t, shape in given), *((t, t.shape) for t in grads))
    return grads


def empty_results(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Results:
    """Tensors for the results of `forward`."""
    batch, heads, _, positions = q.shape
    return v.new_empty(v.shape), q.new_empty(batch, heads, positions), q.new_empty(batch, heads, positions)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Gradients:
    """Tensors for the results of `backward`."""
    q, k, v, rel_height, rel_width = (t.new_empty(t.shape) for t in (q, k, v, rel_height, rel_width))
    return q, k, v, rel_height, rel_width


def dense(maps: Tensor) -> Tensor:
    """The maps, copied unless every sample is contiguous."""
    return maps if dense_samples(maps) else maps.contiguous()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor
) -> tuple[_Numbers, list[Argument]]:
    """Numbers and inputs that both kernels take."""
    q, k, v, rel_height, rel_width = dense(q), dense(k), dense(v), rel_height.contiguous(), rel_width.contiguous()
    batch, heads, d, _ = q.shape
    e, height, width = v.shape[2], (len(rel_height) + 1) // 2, (len(rel_width) + 1) // 2
    numbers = _Numbers(batch, heads, d, e, height, width, d**-0.5, q.stride(0), k.stride(0), v.stride(0))
    maps = [(t, (batch, heads, c, height * width), t.stride(0)) for t, c in ((q, d), (k, d), (v, e))]
    return numbers, [*maps, (rel_height, (2 * height - 1, d)), (rel_width, (2 * width - 1, d))]
