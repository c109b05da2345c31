"""The attention core of AA by Triton kernels: exact, O(HW) memory. `triton/attention_kernels.py` describes them.

Same function as `augment_cli.layers.aa.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor

from augment_cli.layers import triton
from augment_cli.layers.aa.compiled import backward_flops, flops
from augment_cli.layers.aa.first_order import WAY_OUT, refuse_second_derivatives
from augment_cli.layers.aa.relative import resize_table
from augment_cli.layers.dispatch import differentiate, operator

MOST_CHANNELS = 128
"""Largest number of key or value channels of a head: tiles of wider heads do not fit an SM's shared memory."""


def triton_relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other.

    In float32 products are exact to rounding, unless torch allows TF32 for matrix products. In half precision the
    factors of products have the inputs' dtype, as in torch's fused attention, and sums are float32. The result has v's
    dtype, and autocast has no effect. Only gradients of first order: second derivatives and forward mode raise a
    RuntimeError.

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
        out, _, _ = _attention(*maps, *tables)
    return out.unflatten(3, size).movedim(2, -1).to(v.dtype)


def _reason_against(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MOST_CHANNELS:
        return f"they take at most {MOST_CHANNELS} channels a head, not {widest}"
    return triton.reason_against(q, k, v)


def takes_attention(q: Tensor, v: Tensor) -> bool:
    """Whether "auto" may choose the kernels. Shapes: q (N, heads, H, W, d), v (N, heads, H, W, e)."""
    return max(q.shape[-1], v.shape[-1]) <= MOST_CHANNELS and triton.takes(q, v)


def _run(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from augment_cli.layers.triton import attention

    return attention.forward(*inputs)


def _run_backward(*inputs: Tensor) -> tuple[Tensor, ...]:
    from augment_cli.layers.triton import attention

    return attention.backward(*inputs)


def _results(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shifts, sums = (q.new_empty(*q.shape[:2], q.shape[3], dtype=torch.float32) for _ in range(2))
    return v.new_empty(v.shape), shifts, sums


def _gradient_results(d_out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
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
