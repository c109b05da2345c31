"""Softmax attention over the positions of a map, with 2-D relative positions: its backends, and the choice of one.

AA (Bello et al., arXiv 1904.09925, section 3.2), for one head:
    O = softmax( (Q K^T + S_H + S_W) / sqrt(d) ) V
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from augment_cli.compat import are_functorch_transforms_active
from augment_cli.layers import native
from augment_cli.layers.aa.blocked import blocked_relative_attention
from augment_cli.layers.aa.compiled import native_relative_attention
from augment_cli.layers.aa.fused import fused_relative_attention
from augment_cli.layers.aa.relative import relative_logits
from augment_cli.layers.aa.tiled import takes_attention, triton_relative_attention

Backend = Literal["auto", "reference", "blocked", "fused", "native", "triton"]

# Fewest logits of a call, with gradients and without, for which blocks save more than they cost: measured on maps of
# 7x7, 10x10 and 14x14 with one and two threads, on the machine of benchmarks/results/layers-1-thread.json.
_FEW_LOGITS = {True: 2**18, False: 2**16}


def relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """The reference: differentiable operations, every logit in memory at once, O(heads (HW)^2).

    The query is scaled by d^(-1/2) before both the content and the relative logits. [paper]

    Shapes: q, k (N, heads, H, W, d); v (N, heads, H, W, e); tables (2 S - 1, d); result (N, heads, H, W, e).
    """
    height, width, head_channels = q.shape[2:]
    q = q * head_channels**-0.5
    rows, columns = relative_logits(q, rel_height, rel_width)
    logits = q.flatten(2, 3) @ k.flatten(2, 3).transpose(-2, -1)  # N, heads, HW, HW
    logits = logits.unflatten(-1, (height, width))
    logits = logits + rows.flatten(2, 3).unsqueeze(-1) + columns.flatten(2, 3).unsqueeze(-2)
    weights = logits.flatten(-2).softmax(-1)
    return (weights.to(v.dtype) @ v.flatten(2, 3)).unflatten(2, (height, width))


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "reference": relative_attention,
    "blocked": blocked_relative_attention,
    "fused": fused_relative_attention,
    "native": native_relative_attention,
    "triton": triton_relative_attention,
}


def choose_backend(q: Tensor, v: Tensor) -> Backend:
    """The backend that "auto" takes for q (N, heads, H, W, d) and v (N, heads, H, W, e). All compute the same function.

    - native: on a CPU, with compiled kernels and at most 32 bits; under torch.compile too, as one operator;
    - triton: on CUDA, with Triton, at most 32 bits and 128 channels a head; under torch.compile too, as one operator.
      (Chosen by arithmetic, not by measurements: docs/gpu.md.)
    - fused: under torch.compile and torch.export otherwise, which can follow it, and on CUDA;
    - blocked: on a CPU, from 2^18 logits on, or 2^16 where no gradients are wanted;
    - reference: few logits, the meta device, fake tensors, other devices, and inside transforms of torch.func, for
      which native and blocked have no rules.
    """
    if native.takes(q, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
        return "native"
    if takes_attention(q, v):
        return "triton"
    if torch.compiler.is_compiling():
        return "fused"
    if type(q) is not Tensor or are_functorch_transforms_active():
        return "reference"
    if q.device.type == "cuda":
        return "fused"
    batch, heads, height, width, _ = q.shape
    many = batch * heads * (height * width) ** 2 >= _FEW_LOGITS[torch.is_grad_enabled()]
    return "blocked" if many and q.device.type == "cpu" else "reference"


def attention(
    q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Attention of every position to every other, by the named backend. Shapes: as for `relative_attention`.

    Raises:
        ValueError: no such backend.
    """
    chosen = choose_backend(q, v) if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: use 'auto', {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[chosen](q, k, v, rel_height, rel_width)
