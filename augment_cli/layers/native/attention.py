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
    Under torch.compile it is one operator.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    size = (height, width) = q.shape[2:4]
    if q.dtype == torch.float64 or q.device.type != "cpu" or instructions is None:
        raise ValueError(f"native attention is for at most 32 bits, on a processor, and compiled kernels: {WAY_OUT}")
    with torch.autocast(q.device.type, enabled=False):
        maps = (_channels_first(t.float()) for t in (q, k, v))
        tables = (resize_table(t.float(), s).contiguous() for t, s in ((rel_height, height), (rel_width, width)))
        inputs = *maps, *tables
        if torch.compiler.is_compiling():
            out, _ = _operator(*inputs)
        elif torch.is_grad_enabled():
            out, _ = _Attention.apply(*inputs)
        else:
            out = _attention(*inputs)
    return out.unflatten(3, size).movedim(2, -1).to(v.dtype)


class _Attention(FirstOrder):
    """Shapes: q, k (N, heads, d, HW); v (N, heads, e, HW); result (N, heads, e, HW), and the log-sum-exp of the logits
    (N, heads, HW), in powers of two."""

    @staticmethod
    def forward(q, k, v, rel_height, rel_width):
        lse = q.new_empty(*q.shape[:2], q.shape[3])
        return _attention(q, k, v, rel_height, rel_width, lse), lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, d_out, _):
        return (_Gradients.apply if torch.is_grad_enabled() else _gradients)(d_out, *ctx.saved_tensors)


def _gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor, out, lse):
    inputs = q, k, v, rel_height, rel_width
    grads = tuple(torch.empty(t.shape) for t in inputs)
    arguments, place, threads = _call(*inputs, backward=True)
    tensors = out, lse, d_out.contiguous(), *grads, place
    kernels.attention_backward(*arguments, *map(pointer, tensors), threads)
    return grads


class _Gradients(Gradients):
    forward = staticmethod(_gradients)


def _attention(q, k, v, rel_height, rel_width, lse: Tensor | None = None) -> Tensor:
    out = torch.empty(v.shape)
    arguments, place, threads = _call(q, k, v, rel_height, rel_width, backward=False)
    kernels.attention_forward(*arguments, *map(pointer, (out, lse, place)), threads)
    return out


def _call(q, k, v, rel_height, rel_width, backward: bool) -> tuple[tuple, Tensor, int]:
    """The arguments that both kernels begin with, their scratch memory, and the number of threads."""
    batch, heads, d, _ = q.shape
    size = ((len(table) + 1) // 2 for table in (rel_height, rel_width))
    numbers, threads = (heads, d, v.shape[2], *size), torch.get_num_threads()
    place = torch.empty(kernels.attention_scratch(*numbers, backward, threads))
    steps = (long(t.stride(0)) for t in (q, k, v))
    pointers = *map(pointer, (q, k, v)), *steps, pointer(rel_height), pointer(rel_width)
    return (batch, *numbers, ctypes.c_float(d**-0.5), *pointers), place, threads


@torch.library.custom_op("augment_cli::attention", mutates_args=(), device_types="cpu")
def _operator(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(*q.shape[:2], q.shape[3])
    inputs = *map(_dense, (q, k, v)), rel_height.contiguous(), rel_width.contiguous()
    return _attention(*inputs, lse), lse


@_operator.register_fake
def _(q, k, v, rel_height, rel_width):
    return v.new_empty(v.shape), q.new_empty(*q.shape[:2], q.shape[3])


@torch.library.custom_op("augment_cli::attention_backward", mutates_args=(), device_types="cpu")
def _operator_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_height: Tensor,
    rel_width: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    others = (t.contiguous() for t in (rel_height, rel_width, out, lse))
    return _gradients(d_out, *map(_dense, (q, k, v)), *others)


@_operator_backward.register_fake
def _(d_out, q, k, v, rel_height, rel_width, out, lse):
    return tuple(t.new_empty(t.shape) for t in (q, k, v, rel_height, rel_width))


_operator.register_autograd(
    lambda ctx, d_out, _: _operator_backward(d_out, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def _channels_first(maps: Tensor) -> Tensor:
    """Shapes: (N, heads, H, W, c) to (N, heads, c, HW), dense but for the step from sample to sample."""
    return _dense(maps.movedim(-1, 2).flatten(3))


def _dense(maps: Tensor) -> Tensor:
    _, _, channels, positions = maps.shape
    return maps if maps.stride()[1:] == (channels * positions, positions, 1) else maps.contiguous()
