"""The attention core of AA as one compiled kernel: exact, memory O(HW). `attention.cpp` says how it is arranged.

Same function as `augment_cli.layers.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).
"""

import ctypes

import torch
from torch import Tensor

from augment_cli.layers.first_order import WAY_OUT, FirstOrder, Gradients
from augment_cli.layers.native import instructions, kernels, long, pointer
from augment_cli.layers.relative import resize_table


def native_relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other.

    Half-precision inputs are computed in float32, the result has v's type, and autocast changes nothing. Gradients of
    first order only, by `backward`; second derivatives raise a RuntimeError, and so do all transforms of `torch.func`.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    size = (height, width) = q.shape[2:4]
    if q.dtype == torch.float64 or q.device.type != "cpu" or instructions() is None:
        raise ValueError(f"native attention is for at most 32 bits, on a processor, and compiled kernels: {WAY_OUT}")
    with torch.autocast(q.device.type, enabled=False):
        maps = (_channels_first(t.float()) for t in (q, k, v))
        tables = (resize_table(t.float(), s).contiguous() for t, s in ((rel_height, height), (rel_width, width)))
        inputs = *maps, *tables
        out = _Attention.apply(*inputs, size)[0] if torch.is_grad_enabled() else _attention(*inputs, size, None)
    return out.unflatten(3, size).movedim(2, -1).to(v.dtype)


class _Attention(FirstOrder):
    """Shapes: q, k (N, heads, d, HW); v (N, heads, e, HW); result (N, heads, e, HW), and the log-sum-exp of the logits
    (N, heads, HW), in powers of two."""

    @staticmethod
    def forward(q, k, v, rel_height, rel_width, size):
        lse = q.new_empty(*q.shape[:2], q.shape[3])
        return _attention(q, k, v, rel_height, rel_width, size, lse), lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.size = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, d_out, _):
        gradients = _Gradients.apply if torch.is_grad_enabled() else _Gradients.forward
        return *gradients(d_out, *ctx.saved_tensors, ctx.size), None


class _Gradients(Gradients):
    @staticmethod
    def forward(d_out, q, k, v, rel_height, rel_width, out, lse, size):
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, rel_height, rel_width)]
        inputs, place, threads = _call(q, k, v, rel_height, rel_width, size, backward=True)
        tensors = out, lse, d_out.contiguous(), *grads, place
        kernels().attention_backward(*inputs, *map(pointer, tensors), threads)
        return tuple(grads)


def _attention(q, k, v, rel_height, rel_width, size, lse: Tensor | None) -> Tensor:
    out = torch.empty(v.shape, dtype=v.dtype)
    inputs, place, threads = _call(q, k, v, rel_height, rel_width, size, backward=False)
    kernels().attention_forward(*inputs, pointer(out), pointer(lse), pointer(place), threads)
    return out


def _call(q, k, v, rel_height, rel_width, size, backward: bool) -> tuple[tuple, Tensor, int]:
    """The arguments that both kernels begin with, their scratch memory, and the number of threads."""
    batch, heads, d, _ = q.shape
    numbers, threads = (heads, d, v.shape[2], *size), torch.get_num_threads()
    scratch = kernels().attention_scratch
    scratch.restype = ctypes.c_long
    place = torch.empty(scratch(*numbers, backward, threads))
    steps = (long(t.stride(0)) for t in (q, k, v))
    scale = ctypes.c_float(d**-0.5)
    inputs = *(pointer(t) for t in (q, k, v)), *steps, pointer(rel_height), pointer(rel_width)
    return (batch, *numbers, scale, *inputs), place, threads


def _channels_first(maps: Tensor) -> Tensor:
    """Shapes: (N, heads, H, W, c) to (N, heads, c, HW), dense but for the step from sample to sample."""
    maps = maps.movedim(-1, 2).flatten(3)
    _, _, channels, positions = maps.shape
    dense = maps.stride()[1:] == (channels * positions, positions, 1)
    return maps if dense else maps.contiguous()
