"""The convolution of AW, one kernel for every sample, in exact ways of different speed.

    O[n] = conv(I[n], K_n),   K_n[c2, c1, t] = K[c2, c1, t] (1 + s[g, c2] A2[n, g, t]),   g = c1 // r, t a kernel tap

A factor 1 + s A2 belongs to a group of r input channels and a tap; there are C2 C1/r h w of them in a sample, one for
every r numbers of a kernel. Writing U_n for the unfolding of a sample, (H'W', C1 h w), the ways are

- grouped: all K_n at once, and one convolution in N groups. Any device, transform and compiler, but N kernels in
  memory, and on a processor several times slower than its multiply-adds where kernels are larger than maps. What is
  exported or traced are products with the unfolding in its place, which do not fix N.
- chunked: the same for some samples at a time, K_n formed when their turn comes and again in the backward pass.
- unfolded: O[n] = K_n U_n sample by sample, with K_n formed some output channels at a time. Nothing of a kernel's size
  is rearranged for a convolution, which on small maps takes longer than the convolution.
- static: A2 depends on no output channel, so it can scale U instead: O = K U + (s K) (A2 U), for many samples at once.
  Twice the multiply-adds, but nothing of a kernel's size is done for a sample.
- native: a compiled kernel, which multiplies K by its factors as it loads it, so that no K_n is ever formed. About a
  plain convolution's time; in float32, where there is one (`augment_cli.layers.native`).

What the last four hold beyond inputs, results and gradients does not grow with the batch, because the backward pass
forms again what the forward pass formed: at most five times the chunk's kernels (chunked), a copy of K, two blocks of
it and four unfoldings of the chunk (unfolded), eight kernels and five unfoldings of the chunk (static), or two copies
of K, 4 MB or one sample's inputs and outputs, and about 1 MB for each thread (native). Second derivatives,
`torch.func.vmap` and forward mode go through the grouped convolution, whose memory grows.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function

from augment_cli.layers.dispatch import differentiate, operator
from augment_cli.layers.native import attended as native
from augment_cli.layers.per_sample import Geometry, Way, as_channels, conv_of_each
from augment_cli.layers.unfolded import Static, Unfolded

KERNELS_BYTES = 2_400_000
"""Size of the kernels, and of the samples, that `chunked` takes at a time; one at the least."""

LEAST_BYTES = 1_000_000
"""Size of a kernel from which on `unfolded` and `static` are worth their many small steps."""

FEW_POSITIONS = 32
"""Of a map, up to which `static` is the fastest."""


def attended_conv(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, way: str) -> Tensor:
    """conv(x[n], K_n) of every sample, by one of `WAYS`; autocast rounds the map and K_n, as for a convolution.

    Shapes: x (N, C1, H, W), kernel K (C2, C1, h, w), mixing s (C1/r, C2), scales A2 (N, C1/r, h, w); the result
    (N, C2, H', W').
    """
    if geometry.groups > 1:
        raise ValueError(
            f"way {way!r} takes dense kernels only, and this one has {geometry.groups} groups: use 'grouped'"
        )
    if way == "native" and not native.takes_convolution(x, kernel, geometry, len(mixing)):
        raise ValueError(
            f"there is no compiled kernel for a convolution of {x.dtype} on {x.device.type} from {kernel.shape[1]} to "
            f"{len(kernel)} channels with {len(mixing)} maps, or not under autocast or transforms: use 'chunked'"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, scales = x.to(torch.get_autocast_dtype(device)), scales.to(kernel.dtype)
    with torch.autocast(device, enabled=False):
        tensors = x, *WAYS[way].arranged(kernel, mixing, scales)
        if torch.compiler.is_compiling():  # which does not take a Function with rules for vmap and jvp
            return _conv(*tensors, geometry.size, *geometry.options, way)
        return _Attended.apply(*tensors, WAYS[way](geometry))


class _Attended(Function):
    """One of the ways; kernel, mixing and scales as its `arranged` gives them."""

    @staticmethod
    def forward(x, kernel, mixing, scales, way):
        return _conv(x, kernel, mixing, scales, way.geometry.size, *way.geometry.options, way.name)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.way = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, d_out):
        with torch.autocast(d_out.device.type, enabled=False):
            needed = ctx.needs_input_grad[:-1]
            if torch.is_grad_enabled():
                return *_differentiable_gradients(d_out, ctx.saved_tensors, ctx.way, needed), None
            return *_gradients(d_out, ctx.saved_tensors, ctx.way, needed), None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, way = inputs
        return torch.vmap(way.differentiable, in_dims[:-1], randomness=info.randomness)(*tensors), 0

    @staticmethod
    def jvp(ctx, *tangents):
        tensors = ctx.saved_tensors
        tangents = (torch.zeros_like(p) if t is None else t for p, t in zip(tensors, tangents[:-1], strict=True))
        return ctx.way.tangent(*tensors, *tangents)


def _gradients(d_out: Tensor, tensors: tuple[Tensor, ...], way: Way, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of x if it is needed, and all others if any of them is."""
    x, rest = needed[0], any(needed[1:])
    found = _conv_backward(d_out, *tensors, way.geometry.size, *way.geometry.options, way.name, x, rest)
    return [*([] if x else [None]), *found, *([] if rest else [None] * 3)]


def _differentiable_gradients(d_out: Tensor, tensors: tuple[Tensor, ...], way, needed: tuple[bool, ...]):
    """The same through the grouped convolution, when somebody wants derivatives of these gradients."""
    tensors = [t.view_as(t) for t in tensors]  # partial derivatives: scales are made from x
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(way.differentiable(*tensors), wanted, d_out, create_graph=True))
    return [next(found) if need else None for need in needed]


@dataclass(frozen=True)
class Chunked(Way):
    """Some samples at a time, a group each; kernels in the usual order, C2, C1/r, r, h w."""

    name = "chunked"

    @staticmethod
    def arranged(kernel: Tensor, mixing: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernel = kernel.unflatten(1, (len(mixing), -1)).flatten(3)
        return kernel, mixing.t()[:, :, None, None].contiguous(), scales.flatten(2)[:, :, None]

    def natural(self, kernels: Tensor) -> Tensor:
        """(..., C2, C1/r, r, h w) to (..., C2, C1, h, w)."""
        return kernels.flatten(-3, -2).unflatten(-1, self.geometry.size)

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        for part, _, kernels in self.chunks(x, kernel, mixing, scales):
            out[part] = conv_of_each(x[part], self.natural(kernels.to(x.dtype)), self.geometry)

    def gradients(self, d_out, x, kernel, mixing, scales, dx: Tensor | None, sums: list[Tensor]) -> None:
        for part, factors, kernels in self.chunks(x, kernel, mixing, scales):
            samples, natural = len(factors), self.natural(kernels.to(x.dtype)).flatten(0, 1)
            tensors = as_channels(d_out[part]), as_channels(x[part]), natural, None
            options = *self.geometry.options, False, [0, 0], samples, [dx is not None, bool(sums), False]
            dx_part, d_kernels, _ = torch.ops.aten.convolution_backward(*tensors, *options)
            if dx is not None:
                dx[part] = dx_part.view(dx[part].shape)
            if sums:
                d_kernels = d_kernels.view(samples, *kernel.shape).to(sums[0].dtype)
                d_factors = (d_kernels * kernel).sum(3, keepdim=True)
                sums[0].add_(d_kernels.mul_(factors).sum(0))
                sums[1].add_((d_factors * scales[part, None]).sum((0, 4), keepdim=True)[0])
                sums[2][part] = (d_factors * mixing).sum(1)

    def chunks(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor):
        """For some samples at a time: which, 1 + s A2, and K_n."""
        largest = max(kernel.numel() * kernel.element_size(), x.shape[1:].numel() * x.element_size())
        size = max(KERNELS_BYTES // largest, 1)
        for start in range(0, len(scales), size):
            part = slice(start, start + size)
            factors = torch.addcmul(mixing.new_ones(()), mixing, scales[part, None])
            yield part, factors, kernel * factors


@dataclass(frozen=True)
class Native(Chunked):
    """By the compiled kernel; everything in the usual order, and dense."""

    name = "native"

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        with _dense(out) as (place,):
            native.forward(*self.dense(x, kernel, mixing, scales), self.geometry, place)

    def gradients(self, d_out, x, kernel, mixing, scales, dx: Tensor | None, sums: list[Tensor]) -> None:
        inputs, rest = self.dense(x, kernel, mixing, scales), (None, None, None)
        if sums:
            rest = sums[0], sums[1].flatten(1).t(), sums[2]
        with _dense(dx, *rest) as (of_x, of_kernel, of_mixing, of_scales):
            rest = (of_kernel.flatten(1), of_mixing, of_scales.squeeze(2)) if sums else None
            native.backward(d_out.contiguous(), inputs, self.geometry, of_x, rest)

    def dense(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        """Shapes: as `augment_cli.layers.native.attended.forward` wants them."""
        inputs = x, kernel.flatten(1), mixing.flatten(1).t(), scales.squeeze(2)
        return tuple(t.contiguous() for t in inputs)


@contextmanager
def _dense(*tensors: Tensor | None) -> Iterator[list[Tensor | None]]:
    """Dense tensors to write to in the place of these, which are what was written at the end."""
    dense = [t if t is None or t.is_contiguous() else t.new_empty(t.shape) for t in tensors]
    yield dense
    for t, written in zip(tensors, dense, strict=True):
        if written is not t:
            t.copy_(written)


WAYS: dict[str, type[Way]] = {way.name: way for way in (Chunked, Unfolded, Static, Native)}


# The operator: its tensors are as the named backend's `arranged` gives them.


def _run(x, kernel, mixing, scales, *options) -> Tensor:
    out = _result(x, kernel, mixing, scales, *options)
    _way(*options).run(x, kernel, mixing, scales, out)
    return out


def _result(x, kernel, mixing, scales, *options) -> Tensor:
    shape = x.shape[0], kernel.shape[0], *_way(*options).geometry.out_size(x)
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _run_backward(d_out, x, kernel, mixing, scales, *options) -> list[Tensor]:
    """Allocate gradients (sums over the batch in float32 or wider), run the way, cast to the inputs' dtypes."""
    others, (*options, of_x, of_rest) = (kernel, mixing, scales), options
    dx = torch.empty_like(x) if of_x else None
    sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in others if of_rest]
    _way(*options).gradients(d_out, x, *others, dx, sums)
    return [*([dx] if of_x else []), *(total.to(t.dtype) for total, t in zip(sums, others, strict=False))]


def _gradient_results(d_out, x, kernel, mixing, scales, *options) -> list[Tensor]:
    *_, of_x, of_rest = options
    return [torch.empty_like(t) for t in [x] * of_x + [kernel, mixing, scales] * of_rest]


def _way(size: list[int], stride: list[int], padding: list[int], dilation: list[int], name: str) -> Way:
    return WAYS[name](Geometry(tuple(size), tuple(stride), tuple(padding), tuple(dilation)))


def _flops(x_shape, kernel_shape, mixing_shape, scales_shape, *_, out_shape, **__) -> int:
    """The convolution, and the maps of each sample, which a 1x1 convolution of the scales would give."""
    batch, outputs, rows, columns = out_shape
    return 2 * (batch * rows * columns * math.prod(kernel_shape) + outputs * math.prod(scales_shape))


def _backward_flops(d_out_shape, x_shape, kernel_shape, mixing_shape, scales_shape, *options, **_) -> int:
    """The convolution again for x and again for its kernels, and the maps for scales and for mixing."""
    *_, of_x, of_rest = options
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


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.size, ctx.stride, ctx.padding, ctx.dilation, ctx.way = inputs
    ctx.save_for_backward(*tensors)


def _differentiated(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
    way, needed = _way(ctx.size, ctx.stride, ctx.padding, ctx.dilation, ctx.way), ctx.needs_input_grad[:4]
    return *_gradients(d_out, ctx.saved_tensors, way, needed), *[None] * 5


differentiate("attended_conv", _differentiated, _save)


def fastest_way(x: Tensor, kernel: Tensor, geometry: Geometry, groups: int) -> str:
    """Which way to go, as measured on a processor in float32; "grouped" wherever the others may not work.

    "native" wherever there is a compiled kernel; `groups` of input channels have scales. (On 56x56 maps of up to 8
    samples, and on one of 28x28, "grouped" takes a tenth to a quarter less: not looked at here.) Without a kernel: the
    other ways take dense kernels only. "grouped" too where all kernels together are no more than "chunked" forms at a
    time, and for one sample without gradients. The rest compares what has to be rearranged: an unfolding has H'W' C1
    h w numbers, a kernel C2 C1 h w. On a map of a few positions nothing of a kernel's size is worth doing for a sample.
    """
    if native.takes_convolution(x, kernel, geometry, groups):
        return "native"
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
