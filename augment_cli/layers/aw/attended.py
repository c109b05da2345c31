"""The convolution of AW, with one kernel for each sample: its backends, and the choice of one.

    O[n] = conv(I[n], K_n),   K_n[c2, c1, t] = K[c2, c1, t] (1 + s[g, c2] A2[n, g, t]),   g = c1 // r, t a kernel tap

A factor 1 + s A2 belongs to a group of r input channels and to a tap: a sample has C2 C1/r h w of them, one for every r
numbers of a kernel. With U_n for the unfolding of a sample, (H'W', C1 h w), the backends are

- grouped: all K_n at once, and one convolution in N groups. It works on any device and with any transform and compiler,
  but holds N kernels, and on a CPU takes several times as long as its multiply-adds where kernels are larger than maps.
  Exporters and tracers record products with the unfolding instead, which do not fix N.
- chunked: the same for a chunk of samples at a time. K_n is formed with its chunk, and again in the backward pass.
- unfolded: O[n] = K_n U_n sample by sample, with K_n formed some output channels at a time. On small maps this avoids
  rearranging a kernel for a convolution, which takes longer than the convolution itself.
- static: A2 does not depend on the output channel, so it can scale U instead of K: O = K U + (s K) (A2 U), for many
  samples at once. Twice the multiply-adds, but no work of a kernel's size for a sample.
- native: a compiled kernel, which multiplies K by its factors when it loads K, so that no K_n is ever formed. It takes
  about a plain convolution's time; float32 only, where there are kernels (`augment_cli.layers.native`).
- triton: the same on NVIDIA GPUs, in float32, bfloat16 and float16 (`augment_cli.layers.triton`). It uses TF32 where
  torch allows it in convolutions.

The last five recompute in the backward pass what the forward pass formed, so what they hold beside inputs, results and
gradients does not grow with the batch. It is at most: the kernels of a chunk, five times (chunked); a copy of K, two
blocks of it, and a chunk's unfolding four times (unfolded); eight kernels and a chunk's unfolding five times (static);
two copies of K, 4 MB or one sample's inputs and outputs, and about 1 MB for each thread (native); a copy of K, and its
gradient in float32 as often as it takes to fill the GPU (triton). Second derivatives,
`torch.func.vmap` and forward mode use the grouped convolution, whose memory does grow.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from augment_cli.layers import triton
from augment_cli.layers.aw.backend import Backend, ConvBackend, Sums
from augment_cli.layers.aw.chunked import KERNELS_BYTES, Chunked
from augment_cli.layers.aw.compiled import Native
from augment_cli.layers.aw.implicit import Triton
from augment_cli.layers.aw.unfolded import Static, Unfolded
from augment_cli.layers.dispatch import differentiate, operator
from augment_cli.layers.geometry import Geometry
from augment_cli.layers.native import attended

LEAST_BYTES = 1_000_000
"""Smallest kernel for which `unfolded` and `static` gain more than their many small steps cost. Chosen on the
machine of benchmarks/results/layers-1-thread.json."""

FEW_POSITIONS = 32
"""Largest number of output positions for which "static" is the fastest. Chosen like LEAST_BYTES."""

BACKENDS: dict[str, type[ConvBackend]] = {
    backend.name: backend for backend in (Chunked, Unfolded, Static, Native, Triton)
}
"""All but "grouped", which is `per_sample.conv_of_each` of the layer's kernels."""


def attended_conv(
    x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, backend: Backend
) -> Tensor:
    """conv(x[n], K_n) of every sample, by one of `BACKENDS`; autocast rounds x and K_n, as for a convolution.

    Shapes: x (N, C1, H, W), kernel K (C2, C1, h, w), mixing s (C1/r, C2), scales A2 (N, C1/r, h, w); the result
    (N, C2, H', W').

    Raises:
        ValueError: no such backend, a grouped kernel, or a case for which the compiled kernel is not made.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no backend {backend!r}: use 'auto', 'grouped', {', '.join(map(repr, BACKENDS))}")
    if geometry.groups > 1:
        raise ValueError(
            f"backend {backend!r} takes dense kernels only, and this one has {geometry.groups} groups: use 'grouped'"
        )
    if backend == "native" and not attended.takes_convolution(x, kernel, geometry, len(mixing)):
        raise ValueError(
            f"there is no compiled kernel for a convolution of {x.dtype} on {x.device.type} from {kernel.shape[1]} to "
            f"{len(kernel)} channels with {len(mixing)} maps, or not under autocast or transforms: use 'chunked'"
        )
    if backend == "triton" and (reason := triton.reason_against(x, kernel)):
        raise ValueError(f"there are no Triton kernels for this convolution: {reason}; use 'grouped' or 'auto'")
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, scales = x.to(torch.get_autocast_dtype(device)), scales.to(kernel.dtype)
    chosen = BACKENDS[backend]
    with torch.autocast(device, enabled=False):
        tensors = x, *chosen.arranged(kernel, mixing, scales)
        if torch.compiler.is_compiling():  # it rejects a Function that defines vmap and jvp
            return _conv(*tensors, geometry.size, *geometry.options, backend)
        return _Attended.apply(*tensors, chosen(geometry))


def choose_backend(x: Tensor, kernel: Tensor, geometry: Geometry, groups: int) -> Backend:
    """The backend that "auto" takes. All backends compute the same function.

    The rule is from measurements on a CPU in float32, and for CUDA from arithmetic: docs/gpu.md.

    `groups` is C1/r, the number of groups of input channels that have scales.

    - native: wherever the compiled kernel takes the case. (On 56x56 maps of up to 8 samples, and on one 28x28 map,
      "grouped" is faster by a tenth to a quarter; this rule ignores it.)
    - triton: on CUDA, wherever its kernels take the case; under torch.compile too, as one operator.
    - grouped: under compilers and tracers, off the CPU, and for grouped kernels, where the others may not work; also
      where the kernels of all samples fit one chunk of "chunked", and for one sample without gradients.
    - chunked, unfolded, static: "chunked" rearranges kernels, of C2 C1 h w numbers, and the other two unfoldings, of
      H'W' C1 h w numbers: the smaller wins. On a map of few positions "static" avoids all work of a kernel's size.

    Shapes: x (N, C1, H, W), kernel (C2, C1/groups, h, w).
    """
    if attended.takes_convolution(x, kernel, geometry, groups):
        return "native"
    if geometry.groups == 1 and triton.takes(x, kernel):
        return "triton"
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not plain or geometry.groups > 1:
        return "grouped"
    kernel_bytes = kernel.numel() * kernel.element_size()
    if len(x) * kernel_bytes <= KERNELS_BYTES or (len(x) <= 1 and not torch.is_grad_enabled()):
        return "grouped"
    rows, columns = geometry.out_size(x)
    if rows * columns >= len(kernel) or kernel_bytes < LEAST_BYTES:
        return "chunked"
    return "unfolded" if rows * columns > FEW_POSITIONS or len(x) == 1 else "static"


class _Attended(Function):
    """AW's convolution by one backend; kernel, mixing and scales in the order that its `arranged` gives."""

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, backend: ConvBackend) -> Tensor:
        return _conv(x, kernel, mixing, scales, backend.geometry.size, *backend.geometry.options, backend.name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(d_out.device.type, enabled=False):
            gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
            return *gradients(d_out, ctx.saved_tensors, ctx.backend, ctx.needs_input_grad[:-1]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        *tensors, backend = inputs
        return torch.vmap(backend.differentiable, in_dims[:-1], randomness=info.randomness)(*tensors), 0

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tensors = ctx.saved_tensors
        along = (torch.zeros_like(p) if t is None else t for p, t in zip(tensors, tangents[:-1], strict=True))
        return ctx.backend.tangent(*tensors, *along)


Gradients = list[Tensor | None]


def _gradients(d_out: Tensor, tensors: tuple[Tensor, ...], backend: ConvBackend, needed: Sequence[bool]) -> Gradients:
    """The gradient of x if it is needed, and all the others if one of them is."""
    x, rest = needed[0], any(needed[1:])
    geometry = backend.geometry
    found = _conv_backward(d_out, *tensors, geometry.size, *geometry.options, backend.name, x, rest)
    return [*([] if x else [None]), *found, *([] if rest else [None] * 3)]


def _differentiable_gradients(
    d_out: Tensor, tensors: tuple[Tensor, ...], backend: ConvBackend, needed: Sequence[bool]
) -> Gradients:
    """The same through the grouped convolution, so that these gradients can be differentiated."""
    tensors = tuple(t.view_as(t) for t in tensors)  # scales are made from x: their gradient must not flow into x here
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(backend.differentiable(*tensors), wanted, d_out, create_graph=True))
    return [next(found) if need else None for need in needed]


# The operator. Its tensors are as the named backend's `arranged` gives them.

Shape = tuple[int, ...]


def _run(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, *options: Any) -> Tensor:
    out = _result(x, kernel, mixing, scales, *options)
    _backend(*options).run(x, kernel, mixing, scales, out)
    return out


def _result(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, *options: Any) -> Tensor:
    shape = x.shape[0], kernel.shape[0], *_backend(*options).geometry.out_size(x)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _run_backward(
    d_out: Tensor, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, *options: Any
) -> list[Tensor]:
    """Allocate gradients (sums over the batch in float32 or wider), run the backend, cast to the inputs' dtypes."""
    *which, of_x, of_rest = options
    inputs = kernel, mixing, scales
    dx = torch.empty_like(x) if of_x else None
    totals = (torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in inputs)
    sums = Sums(*totals) if of_rest else None
    _backend(*which).gradients(d_out, x, *inputs, dx, sums)
    found = [] if dx is None else [dx]
    return found if sums is None else [*found, *(total.to(t.dtype) for total, t in zip(sums, inputs, strict=True))]


def _gradient_results(
    d_out: Tensor, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, *options: Any
) -> list[Tensor]:
    *_, of_x, of_rest = options
    return [torch.empty_like(t) for t in [x] * of_x + [kernel, mixing, scales] * of_rest]


def _backend(size: list[int], stride: list[int], padding: list[int], dilation: list[int], name: str) -> ConvBackend:
    (h, w), (sy, sx), (py, px), (dy, dx) = size, stride, padding, dilation
    return BACKENDS[name](Geometry((h, w), (sy, sx), (py, px), (dy, dx)))


def _flops(
    x_shape: Shape, kernel_shape: Shape, mixing_shape: Shape, scales_shape: Shape, *_: Any, out_shape: Shape, **__: Any
) -> int:
    """The convolution, and the 1x1 convolution that would expand each sample's scales to its maps."""
    batch, outputs, rows, columns = out_shape
    return 2 * (batch * rows * columns * math.prod(kernel_shape) + outputs * math.prod(scales_shape))


def _backward_flops(
    d_out_shape: Shape,
    x_shape: Shape,
    kernel_shape: Shape,
    mixing_shape: Shape,
    scales_shape: Shape,
    *options: Any,
    **_: Any,
) -> int:
    """The convolution once for x and once for its kernels, and the maps once for scales and once for mixing."""
    of_x, of_rest = options[-2:]
    batch, outputs, rows, columns = d_out_shape
    convolution, maps = batch * rows * columns * math.prod(kernel_shape), outputs * math.prod(scales_shape)
    return 2 * (of_x * convolution + of_rest * (convolution + 2 * maps))


_OPTIONS = "int[] size, int[] stride, int[] padding, int[] dilation, str backend"
_TENSORS = "Tensor x, Tensor kernel, Tensor mixing, Tensor scales"
_conv = operator(f"attended_conv({_TENSORS}, {_OPTIONS}) -> Tensor", _run, _result, _flops)
_conv_backward = operator(
    f"attended_conv_backward(Tensor d_out, {_TENSORS}, {_OPTIONS}, bool of_x, bool of_rest) -> Tensor[]",
    _run_backward,
    _gradient_results,
    _backward_flops,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.size, ctx.stride, ctx.padding, ctx.dilation, ctx.name = inputs
    ctx.save_for_backward(*tensors)


def _differentiated(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    backend = _backend(ctx.size, ctx.stride, ctx.padding, ctx.dilation, ctx.name)
    return *_gradients(d_out, ctx.saved_tensors, backend, ctx.needs_input_grad[:4]), *[None] * 5


differentiate("attended_conv", _differentiated, _save)
