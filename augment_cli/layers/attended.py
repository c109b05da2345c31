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

What the last three hold beyond inputs, results and gradients does not grow with the batch, because the backward pass
forms again what the forward pass formed: at most five times the chunk's kernels (chunked), a copy of K, two blocks of
it and four unfoldings of the chunk (unfolded), or eight kernels and five unfoldings of the chunk (static). Second
derivatives, `torch.func.vmap` and forward mode go through the grouped convolution, whose memory grows.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

KERNELS_BYTES = 2_400_000
"""Size of the kernels, and of the samples, that `chunked` takes at a time; one at the least."""

BLOCK_BYTES = 2_400_000
"""Size of the rows of K_n that `unfolded` forms at a time, for each thread. Measured: best of 0.6 to 9.6 MB."""

CHUNK_BYTES = 8_000_000
"""Size of the unfolding of the samples that `unfolded` and `static` unfold at a time; one at the least."""

LEAST_BYTES = 1_000_000
"""Size of a kernel from which on `unfolded` and `static` are worth their many small steps."""

FEW_POSITIONS = 32
"""Of a map, up to which `static` is the fastest."""


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over a map; pairs of numbers, rows first."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1

    @property
    def options(self) -> tuple:
        """The arguments of a convolution, in torch's order, the groups left out."""
        return self.stride, self.padding, self.dilation

    def out_size(self, x: Tensor) -> tuple[int, int]:
        parts = zip(x.shape[2:], self.size, *self.options, strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)
        return rows, columns


def conv_of_each(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """`grouped`, from differentiable operations: the samples as channels of one map, a group for each.

    Shapes: x (N, C1, H, W), kernels (N, C2, C1/groups, h, w); to (N, C2, H', W').
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return product_of_each(x, kernels, geometry)
    batch = x.shape[0]
    if batch == 0:  # there is no convolution in no groups
        return F.conv2d(x, kernels.sum(0), None, *geometry.options, geometry.groups)
    out = F.conv2d(_as_channels(x), kernels.flatten(0, 1), None, *geometry.options, batch * geometry.groups)
    return out.unflatten(1, (batch, -1)).squeeze(0)


def product_of_each(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """The same as products of matrices: what is recorded then serves every number of samples, groups would not.

    Shapes: as for `conv_of_each`.
    """
    windows = F.unfold(x, geometry.size, geometry.dilation, geometry.padding, geometry.stride)
    windows = windows.unflatten(1, (geometry.groups, -1))  # N, groups, C1/groups h w, H'W'
    rows = kernels.flatten(2).unflatten(1, (geometry.groups, -1))  # N, groups, C2/groups, C1/groups h w
    return (rows @ windows).flatten(1, 2).unflatten(2, geometry.out_size(x))


def _as_channels(x: Tensor) -> Tensor:
    """(N, C, H, W) to (1, N C, H, W)."""
    return x.reshape(1, -1, *x.shape[2:])


def attended_conv(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, geometry: Geometry, way: str) -> Tensor:
    """conv(x[n], K_n) of every sample, by one of `WAYS`; autocast rounds the map and K_n, as for a convolution.

    Shapes: x (N, C1, H, W), kernel K (C2, C1, h, w), mixing s (C1/r, C2), scales A2 (N, C1/r, h, w); the result
    (N, C2, H', W').
    """
    if geometry.groups > 1:
        raise ValueError(
            f"way {way!r} takes dense kernels only, and this one has {geometry.groups} groups: use 'grouped'"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, scales = x.to(torch.get_autocast_dtype(device)), scales.to(kernel.dtype)
    with torch.autocast(device, enabled=False):
        return _Attended.apply(x, *WAYS[way].arranged(kernel, mixing, scales), WAYS[way](geometry))


class _Attended(Function):
    """One of the ways; kernel, mixing and scales as its `arranged` gives them."""

    @staticmethod
    def forward(x, kernel, mixing, scales, way):
        shape = len(x), len(kernel), *way.geometry.out_size(x)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        way.run(x, kernel, mixing, scales, out)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.way = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, d_out):
        with torch.autocast(d_out.device.type, enabled=False):
            gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
            return *gradients(d_out, ctx.saved_tensors, ctx.way, ctx.needs_input_grad[:-1]), None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        *tensors, way = inputs
        return torch.vmap(way.differentiable, in_dims[:-1], randomness=info.randomness)(*tensors), 0

    @staticmethod
    def jvp(ctx, *tangents):
        tensors = ctx.saved_tensors
        tangents = (torch.zeros_like(p) if t is None else t for p, t in zip(tensors, tangents[:-1], strict=True))
        return ctx.way.tangent(*tensors, *tangents)


def _gradients(d_out: Tensor, tensors: tuple[Tensor, ...], way, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """What a way writes into, in float32 or more for what is summed over the samples, and then rounded."""
    x, *others = tensors
    dx = torch.empty_like(x) if needed[0] else None
    sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in others if any(needed[1:])]
    way.gradients(d_out, x, *others, dx, sums)
    if not sums:
        return [dx, None, None, None]
    return [dx, *(total.to(t.dtype) for total, t in zip(sums, others, strict=True))]


def _differentiable_gradients(d_out: Tensor, tensors: tuple[Tensor, ...], way, needed: tuple[bool, ...]):
    """The same through the grouped convolution, when somebody wants derivatives of these gradients."""
    tensors = [t.view_as(t) for t in tensors]  # partial derivatives: scales are made from x
    wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
    found = iter(torch.autograd.grad(way.differentiable(*tensors), wanted, d_out, create_graph=True))
    return [next(found) if need else None for need in needed]


@dataclass(frozen=True)
class _Way:
    """An order of the kernel's axes in which factors broadcast, and what is done with the samples."""

    geometry: Geometry

    def differentiable(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor) -> Tensor:
        """The same from operations that have derivatives of every order."""
        kernels = self.natural(kernel + kernel * (mixing * scales[:, None]))
        return conv_of_each(x, kernels.to(x.dtype), self.geometry)

    def tangent(self, x, kernel, mixing, scales, t_x, t_kernel, t_mixing, t_scales) -> Tensor:
        """Derivative along t, by the rule for products: linear in the input, in the kernel, in mixing and in scales."""
        scales, t_scales = scales[:, None], t_scales[:, None]
        kernels = kernel + kernel * (mixing * scales)
        t_kernels = t_kernel + t_kernel * (mixing * scales) + kernel * (t_mixing * scales + mixing * t_scales)
        kernels, t_kernels = (self.natural(k).to(x.dtype) for k in (kernels, t_kernels))
        return conv_of_each(t_x, kernels, self.geometry) + conv_of_each(x, t_kernels, self.geometry)


@dataclass(frozen=True)
class Chunked(_Way):
    """Some samples at a time, a group each; kernels in the usual order, C2, C1/r, r, h w."""

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
            tensors = _as_channels(d_out[part]), _as_channels(x[part]), natural, None
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


class _InUnfoldings:
    """Kernels in the order C2, r, h w, C1/r, and samples unfolded alike.

    Factors, which do not depend on r, are then one contiguous run of h w C1/r numbers for each output channel.
    """

    @staticmethod
    def arranged(kernel: Tensor, mixing: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernel = kernel.unflatten(1, (len(mixing), -1)).flatten(3).permute(0, 2, 3, 1)
        mixing = mixing.t()[:, None, None].expand(-1, -1, kernel.shape[2], -1)
        return kernel.contiguous(), mixing.contiguous(), scales.flatten(2).transpose(1, 2)[:, None].contiguous()

    def natural(self, kernels: Tensor) -> Tensor:
        """(..., C2, r, h w, C1/r) to (..., C2, C1, h, w)."""
        return kernels.movedim(-1, -3).flatten(-3, -2).unflatten(-1, self.geometry.size)

    def chunks(self, x: Tensor, kernel: Tensor) -> list[slice]:
        rows, columns = self.geometry.out_size(x)
        size = max(CHUNK_BYTES // max(rows * columns * kernel[0].numel() * x.element_size(), 1), 1)
        return [slice(start, start + size) for start in range(0, len(x), size)]

    def unfolded(self, x: Tensor, kernel: Tensor) -> Tensor:
        """U: (N, C1, H, W) to (N H'W', r h w C1/r)."""
        (sy, sx), (py, px), (dy, dx) = self.geometry.options
        (h, w), (height, width) = self.geometry.size, x.shape[2:]
        padded = x.new_zeros(len(x), height + 2 * py, width + 2 * px, *kernel.shape[1::2])  # N, H, W, r, C1/r
        groups = x.unflatten(1, (kernel.shape[3], -1)).permute(0, 3, 4, 2, 1)
        padded[:, py : py + height, px : px + width] = groups
        rows = padded.unfold(1, dy * (h - 1) + 1, sy)[..., ::dy]
        windows = rows.unfold(2, dx * (w - 1) + 1, sx)[..., ::dx]  # N, H', W', r, C1/r, h, w
        return windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(-1, kernel[0].numel())

    def folded(self, d_unfolding: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        """Sums of what comes from one place: (N H'W', r h w C1/r) to (N, C1, H, W)."""
        (sy, sx), (py, px), (dy, dx) = self.geometry.options
        (h, w), (height, width) = self.geometry.size, x.shape[2:]
        rows, columns = self.geometry.out_size(x)
        taps = d_unfolding.view(len(x), rows, columns, *kernel.shape[1:]).unbind(4)
        padded = x.new_zeros(len(x), height + 2 * py, width + 2 * px, *kernel.shape[1::2])
        for tap, (i, j) in zip(taps, product(range(h), range(w)), strict=True):
            padded[:, i * dy :, j * dx :][:, : sy * rows : sy, : sx * columns : sx] += tap
        return padded[:, py : py + height, px : px + width].permute(0, 4, 3, 1, 2).reshape(x.shape)


@dataclass(frozen=True)
class Unfolded(_InUnfoldings, _Way):
    """A sample by products of two matrices, K_n formed some rows at a time in a place that all of them share."""

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        place = self.place(kernel)
        for chunk in self.chunks(x, kernel):
            for n, unfolding in zip(_numbers(chunk, x), self.unfoldings(x[chunk], kernel), strict=True):
                for part, _, formed in self.blocks(kernel, mixing, scales[n], place):
                    out[n, part] = _product(unfolding, formed.to(x.dtype)).t().view(-1, *out.shape[2:])

    def gradients(self, d_out, x, kernel, mixing, scales, dx: Tensor | None, sums: list[Tensor]) -> None:
        place = self.place(kernel)
        for chunk in self.chunks(x, kernel):
            unfoldings = self.unfoldings(x[chunk], kernel)
            d_unfoldings = []
            for n, unfolding in zip(_numbers(chunk, x), unfoldings, strict=True):
                d_unfolding = None
                for part, factors, formed in self.blocks(kernel, mixing, scales[n], place):
                    d_rows = d_out[n, part].flatten(1)  # some of C2, H'W'
                    if dx is not None:
                        d_unfolding = _product(d_rows.t().contiguous(), formed.to(x.dtype).t(), d_unfolding)
                    if sums:
                        d_formed = _product(d_rows, unfolding.t()).view(-1, *kernel.shape[1:]).to(sums[0].dtype)
                        sums[0][part].addcmul_(d_formed, factors)
                        d_factors = d_formed.mul_(kernel[part]).sum(1, keepdim=True)
                        sums[1][part].addcmul_(d_factors, scales[n])
                        sums[2][n] += d_factors.mul_(mixing[part]).sum(0)
                d_unfoldings.append(d_unfolding)
            if dx is not None:
                dx[chunk] = self.folded(torch.cat(d_unfoldings), x[chunk], kernel)

    def unfoldings(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self.unfolded(x, kernel).view(len(x), -1, kernel[0].numel())

    def place(self, kernel: Tensor) -> Tensor:
        """For some rows of K_n, of a number with which products fill whole registers."""
        rows = BLOCK_BYTES * torch.get_num_threads() // (kernel[0].numel() * kernel.element_size())
        return torch.empty_like(kernel[: max(rows // 64 * 64, 32)])

    def blocks(self, kernel: Tensor, mixing: Tensor, scales: Tensor, place: Tensor):
        """For some output channels at a time: which, 1 + s A2, and their rows of K_n."""
        one = mixing.new_ones(())
        for start in range(0, len(kernel), len(place)):
            part = slice(start, start + len(place))
            factors = torch.addcmul(one, mixing[part], scales)
            yield part, factors, torch.mul(kernel[part], factors, out=place[: len(factors)]).flatten(1)


@dataclass(frozen=True)
class Static(_InUnfoldings, _Way):
    """Samples together: U by K and A2 U by s K."""

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        flat, mixed = (t.flatten(1).to(x.dtype) for t in (kernel, kernel * mixing))
        for part in self.chunks(x, kernel):
            unfolding = self.unfolded(x[part], kernel)
            sums = _product(unfolding, flat).add_(_product(self.modulated(unfolding, kernel, scales[part]), mixed))
            out[part] = sums.view(-1, *out.shape[2:], len(kernel)).permute(0, 3, 1, 2)
            del unfolding  # before the next

    def gradients(self, d_out, x, kernel, mixing, scales, dx: Tensor | None, sums: list[Tensor]) -> None:
        flat, mixed = (t.flatten(1).to(x.dtype).t() for t in (kernel, kernel * mixing))
        d_mixed = torch.zeros_like(sums[0]) if sums else None
        for part in self.chunks(x, kernel):
            d_rows = d_out[part].permute(0, 2, 3, 1).reshape(-1, len(kernel))  # n H'W', C2
            d_modulated = _product(d_rows, mixed)
            if sums:
                totals = sums[0].flatten(1), d_mixed.flatten(1)
                sums[2][part] = self.sum_gradients(d_rows, d_modulated, x[part], kernel, scales[part], totals)
            if dx is not None:
                d_unfolding = _product(d_rows, flat).add_(self.modulated(d_modulated, kernel, scales[part]))
                dx[part] = self.folded(d_unfolding, x[part], kernel)
                del d_unfolding
            del d_modulated  # before the next
        if sums:
            sums[0].addcmul_(d_mixed, mixing)
            sums[1].copy_(d_mixed.mul_(kernel).sum(1, keepdim=True))

    def sum_gradients(self, d_rows, d_modulated, x, kernel, scales, totals: tuple[Tensor, Tensor]) -> Tensor:
        """Add some samples' part to the gradients of K and s K; return those of their scales."""
        unfolding = self.unfolded(x, kernel)
        modulated = self.modulated(unfolding, kernel, scales)
        d_rows = d_rows.t().contiguous()
        for total, seen in zip(totals, (unfolding, modulated), strict=True):
            total.add_(_product(d_rows, seen.t()))
        products = torch.mul(unfolding, d_modulated, out=modulated).view(len(x), -1, *kernel.shape[2:])
        return products.sum(1, keepdim=True, dtype=totals[0].dtype)

    def modulated(self, unfolding: Tensor, kernel: Tensor, scales: Tensor) -> Tensor:
        samples = unfolding.view(len(scales), -1, *kernel.shape[1:])  # n, H'W', r, h w, C1/r
        return (samples * scales.to(unfolding.dtype)[:, None]).view(unfolding.shape)


WAYS = {"chunked": Chunked, "unfolded": Unfolded, "static": Static}


def _numbers(chunk: slice, x: Tensor) -> range:
    return range(*chunk.indices(len(x)))


def _product(a: Tensor, b: Tensor, more: Tensor | None = None) -> Tensor:
    """a b^T + more, (P, Q) and (R, Q) to (P, R): by oneDNN, on some processors twice as fast as torch's BLAS."""
    if a.dtype == torch.float32 and len(a) and torch.backends.mkldnn.enabled and _has_onednn():
        if more is None:
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise(a, more, b, None, "add")
    return a @ b.t() if more is None else torch.addmm(more, a, b.t())


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def fastest_way(x: Tensor, kernel: Tensor, geometry: Geometry) -> str:
    """Which way to go, as measured on a processor in float32; "grouped" wherever the others may not work.

    Those take dense kernels only. "grouped" too where all kernels together are no more than "chunked" forms at a time,
    and for one sample without gradients. The rest compares what has to be rearranged: an unfolding has H'W' C1 h w
    numbers, a kernel C2 C1 h w. On a map of a few positions nothing of a kernel's size is worth doing for a sample.
    """
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
