"""Softmax attention over the positions of a map, with 2-D relative positions: the ways to run it, and which is taken.

AA (Bello et al., arXiv 1904.09925, section 3.2), for one head:
    O = softmax( (Q K^T + S_H + S_W) / sqrt(d) ) V
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from augment_cli.layers.blocked import blocked_relative_attention
from augment_cli.layers.fused import fused_relative_attention
from augment_cli.layers.native import takes
from augment_cli.layers.native.attention import native_relative_attention
from augment_cli.layers.relative import relative_logits

Path = Literal["auto", "reference", "blocked", "fused", "native"]

# Logits of a call under which blocks cost more than they save, with gradients and without: measured on maps of 7x7,
# 10x10 and 14x14 positions with one and two threads.
_FEW_LOGITS = {True: 2**18, False: 2**16}


def relative_attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
    """The reference: every logit materialised, O(heads (HW)^2) memory, from differentiable operations.

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


PATHS: dict[str, Callable[..., Tensor]] = {
    "reference": relative_attention,
    "blocked": blocked_relative_attention,
    "fused": fused_relative_attention,
    "native": native_relative_attention,
}


def choose_path(q: Tensor) -> str:
    """The way that "auto" takes for a query (N, heads, H, W, d). All give the same numbers.

    - native, on a CPU, where there are compiled kernels and the numbers have at most 32 bits; torch.compile takes it as
      one operator;
    - fused, when torch.compile or torch.export look on otherwise, who can follow it, and on CUDA;
    - blocked, on a CPU, from 2^18 logits on, and from 2^16 on where no gradients are wanted;
    - reference otherwise: few logits, the meta device, fake tensors, other devices, and inside torch.func transforms,
      which native and blocked have no rules for.
    """
    if takes(q, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
        return "native"
    if torch.compiler.is_compiling():
        return "fused"
    if type(q) is not Tensor or torch._C._are_functorch_transforms_active():
        return "reference"
    if q.device.type == "cuda":
        return "fused"
    batch, heads, height, width, _ = q.shape
    many = batch * heads * (height * width) ** 2 >= _FEW_LOGITS[torch.is_grad_enabled()]
    return "blocked" if many and q.device.type == "cpu" else "reference"


def attention(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor, path: Path = "auto") -> Tensor:
    """Attention of every position to every other, by the named way. Shapes: as for `relative_attention`."""
    chosen = choose_path(q) if path == "auto" else path
    return PATHS[chosen](q, k, v, rel_height, rel_width)
