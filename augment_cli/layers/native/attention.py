"""The attention core of AA as one compiled kernel: exact, memory O(HW). `attention.cpp` says how it is arranged.

Same function as `augment_cli.layers.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).
"""

import ctypes

import torch
from torch import Tensor

from augment_cli.layers.dispatch import differentiate, operator
from augment_cli.layers.first_order import WAY_OUT, has_tangents, refuse_second_derivatives
from augment_cli.layers.native import Kernel, dense_samples, fields, instructions
from augment_cli.layers.relative import resize_table


def native_relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other.

    Half-precision inputs are computed in float32, the result has v's type, and autocast changes nothing. Gradients of
    first order only, by `backward`; second derivatives, forward mode and all transforms of `torch.func` raise a
    RuntimeError. One operator of torch's dispatcher, to compilers and to counters of FLOPs.

    Gradients are those of the plain operations in float32 within some roundings, whatever the size of the logits: both
    passes compute a query's weights alike.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    size = (height, width) = q.shape[2:4]
    if q.dtype == torch.float64 or q.device.type != "cpu" or instructions is None:
        raise ValueError(f"native attention is for at most 32 bits, on a processor, and compiled kernels: {WAY_OUT}")
    if not torch.compiler.is_compiling() and has_tangents(q, k, v, rel_height, rel_width):
        raise RuntimeError(f"native attention has no forward mode, and no rule for torch.func; {WAY_OUT}")
    with torch.autocast(q.device.type, enabled=False):
        maps = (_channels_first(t.float()) for t in (q, k, v))
        tables = (resize_table(t.float(), s).contiguous() for t, s in ((rel_height, height), (rel_width, width)))
        out, _, _ = _attention(*maps, *tables)
    return out.unflatten(3, size).movedim(2, -1).to(v.dtype)


class _Numbers(ctypes.Structure):
    """`struct Attention` in attention.cpp."""

    _fields_ = (
        *fields(ctypes.c_int, "batch heads d e height width"),
        ("scale", ctypes.c_float),
        *fields(ctypes.c_long, "q_step k_step v_step"),
    )


_forward_kernel = Kernel("attention_forward", _Numbers, tensors=8)
_backward_kernel = Kernel("attention_backward", _Numbers, tensors=14)


def _forward(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and of every query the base-2 logit that its weights are relative to, and the sum of these.

    Shapes: q, k (N, heads, d, HW); v (N, heads, e, HW); tables (2 H - 1, d) and (2 W - 1, d); result (N, heads, e, HW);
    logits and sums (N, heads, HW).
    """
    numbers, inputs = _arguments(q, k, v, rel_height, rel_width)
    results = _results(q, k, v, rel_height, rel_width)
    _forward_kernel(numbers, *inputs, *((t, t.shape) for t in results))
    return results


def _backward(d_out, q, k, v, rel_height, rel_width, out, shifts, sums) -> tuple[Tensor, ...]:
    """Gradients of the five inputs."""
    numbers, inputs = _arguments(q, k, v, rel_height, rel_width)
    grads = _gradients(d_out, q, k, v, rel_height, rel_width, out, shifts, sums)
    batch, heads, positions = numbers.batch, numbers.heads, numbers.height * numbers.width
    results = (out, (batch, heads, numbers.e, positions)), *((t, (batch, heads, positions)) for t in (shifts, sums))
    d_out = d_out.contiguous(), (batch, heads, numbers.e, positions)
    _backward_kernel(
        numbers, *inputs, *((t.contiguous(), s) for t, s in results), d_out, *((t, t.shape) for t in grads)
    )
    return grads


def _arguments(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> tuple[_Numbers, tuple]:
    """Numbers and inputs of a call of either kernel."""
    q, k, v, tables = _dense(q), _dense(k), _dense(v), (rel_height.contiguous(), rel_width.contiguous())
    (batch, heads, d, _), e = q.shape, v.shape[2]
    height, width = ((len(table) + 1) // 2 for table in tables)
    maps = [(t, (batch, heads, c, height * width), t.stride(0)) for t, c in ((q, d), (k, d), (v, e))]
    numbers = _Numbers(batch, heads, d, e, height, width, d**-0.5, *(step for _, _, step in maps))
    return numbers, (*maps, (tables[0], (2 * height - 1, d)), (tables[1], (2 * width - 1, d)))


def _results(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, positions = q.shape
    return v.new_empty(v.shape), q.new_empty(batch, heads, positions), q.new_empty(batch, heads, positions)


def _gradients(d_out, q, k, v, rel_height, rel_width, out, shifts, sums) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v, rel_height, rel_width))


def _flops(q_shape, k_shape, v_shape, height_shape, width_shape, *_, **__) -> int:
    """Products of queries with keys and with rows of the tables, and of weights with values."""
    batch, heads, d, positions = q_shape
    lines = (height_shape[0] + 1) // 2 + (width_shape[0] + 1) // 2
    return 2 * batch * heads * positions * (positions * (d + v_shape[2]) + lines * d)


def _backward_flops(d_out_shape, *inputs, **_) -> int:
    """A product has two in its derivative. What the kernel makes again is not counted."""
    return 2 * _flops(*inputs)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor rel_height, Tensor rel_width"
_attention = operator(f"relative_attention({_TENSORS}) -> (Tensor, Tensor, Tensor)", _forward, _results, _flops, "CPU")
_attention_backward = operator(
    f"relative_attention_backward(Tensor d_out, {_TENSORS}, Tensor out, Tensor shifts, Tensor sums) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _gradients,
    _backward_flops,
    "CPU",
)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # of shifts and sums, which nobody sees


differentiate("relative_attention", lambda ctx, d_out, *_: _attention_backward(d_out, *ctx.saved_tensors), _save)
differentiate("relative_attention_backward", refuse_second_derivatives)


def _channels_first(maps: Tensor) -> Tensor:
    """Shapes: (N, heads, H, W, c) to (N, heads, c, HW), dense but for the step from sample to sample."""
    return _dense(maps.movedim(-1, 2).flatten(3))


def _dense(maps: Tensor) -> Tensor:
    return maps if dense_samples(maps) else maps.contiguous()
