"""The attention core of AA by the compiled kernel: exact, O(HW) memory. `native/attention.h` describes the algorithm.

Same function as `augment_cli.layers.aa.attention.relative_attention` (Bello et al., arXiv 1904.09925, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor

from augment_cli.layers import native
from augment_cli.layers.aa.first_order import WAY_OUT, has_tangents, refuse_second_derivatives
from augment_cli.layers.aa.relative import resize_table
from augment_cli.layers.dispatch import differentiate, operator
from augment_cli.layers.native import attention


def native_relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """Attention of every position to every other.

    Half-precision inputs are computed in float32, the result has v's dtype, and autocast has no effect. Only gradients
    of first order, by `backward`: second derivatives, forward mode and all transforms of `torch.func` raise a
    RuntimeError. Compilers and FLOP counters see one operator.

    Both passes compute a query's weights alike, so gradients are as near to float64 as those of the plain operations in
    float32, however large the logits.

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).

    Raises:
        ValueError: float64, a device other than the CPU, or no compiled kernels.
    """
    size = (height, width) = q.shape[2:4]
    if q.dtype == torch.float64 or q.device.type != "cpu" or native.library is None:
        raise ValueError(f"native attention takes at most 32 bits, on a CPU, with compiled kernels; {WAY_OUT}")
    if not torch.compiler.is_compiling() and has_tangents(q, k, v, rel_height, rel_width):
        raise RuntimeError(f"native attention has no forward mode and no rules for torch.func; {WAY_OUT}")
    with torch.autocast(q.device.type, enabled=False):
        maps = (_channels_first(t.float()) for t in (q, k, v))
        tables = (resize_table(t.float(), s).contiguous() for t, s in ((rel_height, height), (rel_width, width)))
        out, _, _ = _attention(*maps, *tables)
    return out.unflatten(3, size).movedim(2, -1).to(v.dtype)


def _channels_first(maps: Tensor) -> Tensor:
    """Shapes: (N, heads, H, W, c) to (N, heads, c, HW), where every sample is dense."""
    return attention.dense(maps.movedim(-1, 2).flatten(3))


Shape = tuple[int, ...]


def flops(q_shape: Shape, k_shape: Shape, v_shape: Shape, height_shape: Shape, width_shape: Shape, **_: Any) -> int:
    """Products of queries with keys and with the tables' rows, and of weights with values."""
    batch, heads, d, positions = q_shape
    lines = (height_shape[0] + 1) // 2 + (width_shape[0] + 1) // 2
    return 2 * batch * heads * positions * (positions * (d + v_shape[2]) + lines * d)


def backward_flops(d_out_shape: Shape, *shapes: Shape, **_: Any) -> int:
    """Twice the forward pass: each product has two in its derivative. Recomputed logits are not counted."""
    return 2 * flops(*shapes[:5])


def _gradient_results(d_out: Tensor, *inputs_and_results: Tensor) -> attention.Gradients:
    return attention.empty_gradients(*inputs_and_results[:5])


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor rel_height, Tensor rel_width"
_attention = operator(
    f"relative_attention({_TENSORS}) -> (Tensor, Tensor, Tensor)",
    attention.forward,
    attention.empty_results,
    flops,
    "CPU",
)
_attention_backward = operator(
    f"relative_attention_backward(Tensor d_out, {_TENSORS}, Tensor out, Tensor shifts, Tensor sums) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    attention.backward,
    _gradient_results,
    backward_flops,
    "CPU",
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # shifts and sums have none


differentiate("relative_attention", lambda ctx, d_out, *_: _attention_backward(d_out, *ctx.saved_tensors), _save)
differentiate("relative_attention_backward", refuse_second_derivatives)
