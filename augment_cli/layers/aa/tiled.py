"""The attention core of AA by Triton kernels: exact, O(HW) memory. `triton/attention_kernels.py` describes them.

Same function as `augment_cli.layers.aa.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from augment_cli.layers import triton
from augment_cli.layers.aa.compiled import backward_flops, flops
from augment_cli.layers.aa.first_order import WAY_OUT, FirstOrder, Gradients, refuse_second_derivatives
from augment_cli.layers.aa.relative import resize_table
from augment_cli.layers.dispatch import differentiate, operator

MOST_CHANNELS = 128
"""Largest number of key or value channels of a head: tiles of wider heads do not fit an SM's shared memory."""


def triton_relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other.

    In float32 products are exact to rounding, unless torch allows TF32 for matrix products. In half precision the
    factors of products have the inputs' dtype, as in torch's fused attention, and sums are float32. The result has v's
    dtype, and autocast has no effect. Only gradients of first order, also by `torch.func.grad` and `torch.func.vmap`:
    second derivatives and forward mode raise a RuntimeError.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).

    Raises:
        ValueError: the kernels do not take the tensors; the message says why.
    """
    size = (height, width) = q.shape[2:4]
    if reason := _reason_against(q, k, v):
        raise ValueError(f"there are no Triton kernels for this attention: {reason}; {WAY_OUT}, or to 'auto'")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    with torch.autocast(q.device.type, enabled=False):
        maps = (t.to(dtype).movedim(-1, 2).flatten(3) for t in (q, k, v))  # N, heads, channels, HW
        tables = (resize_table(t, s).contiguous() for t, s in ((rel_height, height), (rel_width, width)))
        run = _attention if torch.compiler.is_compiling() else _Attention.apply  # compilers reject a Function with vmap
        out, _, _ = run(*maps, *tables)
    return out.unflatten(3, size).movedim(2, -1).to(v.dtype)


def _reason_against(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MOST_CHANNELS:
        return f"they take at most {MOST_CHANNELS} channels a head, not {widest}"
    return triton.reason_against(q, k, v)


def takes_attention(q: Tensor, v: Tensor) -> bool:
    """Whether "auto" may choose the kernels. Shapes: q (N, heads, H, W, d), v (N, heads, H, W, e)."""
    return max(q.shape[-1], v.shape[-1]) <= MOST_CHANNELS and triton.takes(q, v)


Results = tuple[Tensor, ...]
Mapped = tuple[Results, tuple[int, ...]]
"""Results, and the axis of each that `torch.func.vmap` maps."""


class _Attention(FirstOrder):
    """The operator with the derivatives and the rule for `torch.func.vmap` that it has. Shapes: as for the operator."""

    @staticmethod
    def forward(*tensors: Tensor) -> Results:
        return _attention(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Results) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *_: Tensor) -> Results:
        return _Gradients.apply(d_out, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Mapped:
        """Samples of the mapped axis are samples of one call, unless their tables differ."""
        size = info.batch_size
        if in_dims[3:] != (None, None):
            return _one_by_one(_Attention, size, in_dims, tensors)
        maps = (
            t.expand(size, *t.shape) if i is None else t.movedim(i, 0)
            for t, i in zip(tensors[:3], in_dims[:3], strict=True)
        )
        results = _Attention.apply(*(t.flatten(0, 1) for t in maps), *tensors[3:])
        return tuple(t.unflatten(0, (size, -1)) for t in results), (0, 0, 0)


class _Gradients(Gradients):
    """Gradients of `_Attention`."""

    @staticmethod
    def forward(*tensors: Tensor) -> Results:
        return _attention_backward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Mapped:
        return _one_by_one(_Gradients, info.batch_size, in_dims, tensors)


def _one_by_one(call: type[Function], size: int, in_dims: tuple[int | None, ...], tensors: Results) -> Mapped:
    """One call for each element of the mapped axis."""
    elements = [
        call.apply(*(t if i is None else t.select(i, n) for t, i in zip(tensors, in_dims, strict=True)))
        for n in range(size)
    ]
    results = tuple(torch.stack(parts) for parts in zip(*elements, strict=True))
    return results, (0,) * len(results)


def _run(*inputs: Tensor) -> Results:
    from augment_cli.layers.triton import attention

    return attention.forward(*inputs)


def _run_backward(*inputs: Tensor) -> Results:
    from augment_cli.layers.triton import attention

    return attention.backward(*inputs)


def _results(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Results:
    shifts, sums = (q.new_empty(*q.shape[:2], q.shape[3], dtype=torch.float32) for _ in range(2))
    return v.new_empty(v.shape), shifts, sums


def _gradient_results(d_out: Tensor, *inputs: Tensor) -> Results:
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor rel_height, Tensor rel_width"
_attention = operator(f"triton_attention({_TENSORS}) -> (Tensor, Tensor, Tensor)", _run, _results, flops)
_attention_backward = operator(
    f"triton_attention_backward(Tensor d_out, {_TENSORS}, Tensor out, Tensor shifts, Tensor sums) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _gradient_results,
    backward_flops,
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # shifts and sums have none


differentiate("triton_attention", lambda ctx, d_out, *_: _attention_backward(d_out, *ctx.saved_tensors), _save)
differentiate("triton_attention_backward", refuse_second_derivatives)
