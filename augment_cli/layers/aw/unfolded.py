"""Two backends of AW's convolution by matrix products, `unfolded` and `static`; `aw.attended` describes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from augment_cli.compat import linear_pointwise
from augment_cli.layers.aw.backend import Arranged, ConvBackend, Sums

BLOCK_BYTES = 2_400_000
"""Bytes of the rows of K_n that `unfolded` forms at a time, for each thread: the fastest of 0.6 to 9.6 MB on the
machine of benchmarks/results/layers-1-thread.json."""

CHUNK_BYTES = 8_000_000
"""Bytes of the unfolding of a chunk, the samples that `unfolded` and `static` unfold at a time; a chunk is at least one
sample. Chosen on the machine of benchmarks/results/layers-1-thread.json."""


@dataclass(frozen=True)
class _UnfoldedOrder(ConvBackend):
    """Kernels in the order C2, r, h w, C1/r, and samples unfolded in the same order.

    The factors do not depend on r, so each output channel's are h w C1/r contiguous numbers.
    """

    @staticmethod
    def arranged(kernel: Tensor, mixing: Tensor, scales: Tensor) -> Arranged:
        kernel = kernel.unflatten(1, (len(mixing), -1)).flatten(3).permute(0, 2, 3, 1)
        mixing = mixing.t()[:, None, None].expand(-1, -1, kernel.shape[2], -1)
        return kernel.contiguous(), mixing.contiguous(), scales.flatten(2).transpose(1, 2)[:, None].contiguous()

    def natural(self, kernels: Tensor) -> Tensor:
        """(..., C2, r, h w, C1/r) to (..., C2, C1, h, w)."""
        return kernels.movedim(-1, -3).flatten(-3, -2).unflatten(-1, self.geometry.size)

    def chunks(self, x: Tensor, kernel: Tensor) -> list[slice]:
        """Samples of which the unfoldings have at most CHUNK_BYTES, or one sample each."""
        rows, columns = self.geometry.out_size(x)
        size = max(CHUNK_BYTES // max(rows * columns * kernel[0].numel() * x.element_size(), 1), 1)
        return [slice(start, start + size) for start in range(0, len(x), size)]

    def unfolded(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Unfold the map, U. Shapes: (N, C1, H, W) to (N H'W', r h w C1/r)."""
        (sy, sx), (py, px), (dy, dx) = self.geometry.options
        (h, w), (height, width) = self.geometry.size, x.shape[2:]
        padded = x.new_zeros(len(x), height + 2 * py, width + 2 * px, *kernel.shape[1::2])  # N, H, W, r, C1/r
        groups = x.unflatten(1, (kernel.shape[3], -1)).permute(0, 3, 4, 2, 1)
        padded[:, py : py + height, px : px + width] = groups
        rows = padded.unfold(1, dy * (h - 1) + 1, sy)[..., ::dy]
        windows = rows.unfold(2, dx * (w - 1) + 1, sx)[..., ::dx]  # N, H', W', r, C1/r, h, w
        return windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(-1, kernel[0].numel())

    def folded(self, d_unfolding: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        """Derivative of `unfolded`: sum what was read from one place. Shapes: (N H'W', r h w C1/r) to (N, C1, H, W)."""
        (sy, sx), (py, px), (dy, dx) = self.geometry.options
        (h, w), (height, width) = self.geometry.size, x.shape[2:]
        rows, columns = self.geometry.out_size(x)
        taps = d_unfolding.view(len(x), rows, columns, *kernel.shape[1:]).unbind(4)
        padded = x.new_zeros(len(x), height + 2 * py, width + 2 * px, *kernel.shape[1::2])
        for tap, (i, j) in zip(taps, product(range(h), range(w)), strict=True):
            padded[:, i * dy :, j * dx :][:, : sy * rows : sy, : sx * columns : sx] += tap
        return padded[:, py : py + height, px : px + width].permute(0, 4, 3, 1, 2).reshape(x.shape)


@dataclass(frozen=True)
class Unfolded(_UnfoldedOrder):
    """One matrix product for each sample and block of output channels, whose rows of K_n all use the same memory."""

    name = "unfolded"

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        place = self.place(kernel)
        for chunk in self.chunks(x, kernel):
            for n, unfolding in enumerate(self.unfoldings(x[chunk], kernel), chunk.start):
                for part, _, formed in self.blocks(kernel, mixing, scales[n], place):
                    out[n, part] = _product(unfolding, formed.to(x.dtype)).t().view(-1, *out.shape[2:])

    def gradients(
        self,
        d_out: Tensor,
        x: Tensor,
        kernel: Tensor,
        mixing: Tensor,
        scales: Tensor,
        dx: Tensor | None,
        sums: Sums | None,
    ) -> None:
        place = self.place(kernel)
        for chunk in self.chunks(x, kernel):
            unfoldings = self.unfoldings(x[chunk], kernel)
            d_unfoldings: list[Tensor] = []
            for n, unfolding in enumerate(unfoldings, chunk.start):
                d_unfolding: Tensor | None = None
                for part, factors, formed in self.blocks(kernel, mixing, scales[n], place):
                    d_rows = d_out[n, part].flatten(1)  # some of C2, H'W'
                    if dx is not None:
                        d_unfolding = _product(d_rows.t().contiguous(), formed.to(x.dtype).t(), d_unfolding)
                    if sums is not None:
                        d_formed = _product(d_rows, unfolding.t()).view(-1, *kernel.shape[1:]).to(sums.kernel.dtype)
                        sums.kernel[part].addcmul_(d_formed, factors)
                        d_factors = d_formed.mul_(kernel[part]).sum(1, keepdim=True)
                        sums.mixing[part].addcmul_(d_factors, scales[n])
                        sums.scales[n] += d_factors.mul_(mixing[part]).sum(0)
                if d_unfolding is not None:
                    d_unfoldings.append(d_unfolding)
            if dx is not None:
                dx[chunk] = self.folded(torch.cat(d_unfoldings), x[chunk], kernel)

    def unfoldings(self, x: Tensor, kernel: Tensor) -> Tensor:
        """U of each sample: (N, H'W', r h w C1/r)."""
        return self.unfolded(x, kernel).view(len(x), -1, kernel[0].numel())

    def place(self, kernel: Tensor) -> Tensor:
        """Memory for some rows of K_n: a multiple of 64 where there are as many, so that products fill registers."""
        rows = BLOCK_BYTES * torch.get_num_threads() // (kernel[0].numel() * kernel.element_size())
        return torch.empty_like(kernel[: max(rows // 64 * 64, 32)])

    def blocks(
        self, kernel: Tensor, mixing: Tensor, scales: Tensor, place: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each block of output channels: which channels, their factors 1 + s A2, and their rows of K_n."""
        one = mixing.new_ones(())
        for start in range(0, len(kernel), len(place)):
            part = slice(start, start + len(place))
            factors = torch.addcmul(one, mixing[part], scales)
            yield part, factors, torch.mul(kernel[part], factors, out=place[: len(factors)]).flatten(1)


@dataclass(frozen=True)
class Static(_UnfoldedOrder):
    """Two matrix products for many samples at once, O = K U + (s K) (A2 U)."""

    name = "static"

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        flat, mixed = (t.flatten(1).to(x.dtype) for t in (kernel, kernel * mixing))
        for part in self.chunks(x, kernel):
            unfolding = self.unfolded(x[part], kernel)
            sums = _product(unfolding, flat).add_(_product(self.modulated(unfolding, kernel, scales[part]), mixed))
            out[part] = sums.view(-1, *out.shape[2:], len(kernel)).permute(0, 3, 1, 2)
            del unfolding  # before the next one is made

    def gradients(
        self,
        d_out: Tensor,
        x: Tensor,
        kernel: Tensor,
        mixing: Tensor,
        scales: Tensor,
        dx: Tensor | None,
        sums: Sums | None,
    ) -> None:
        flat, mixed = (t.flatten(1).to(x.dtype).t() for t in (kernel, kernel * mixing))
        d_mixed = kernel.new_empty(0) if sums is None else torch.zeros_like(sums.kernel)  # gradient of s K
        for part in self.chunks(x, kernel):
            d_rows = d_out[part].permute(0, 2, 3, 1).reshape(-1, len(kernel))  # n H'W', C2
            d_modulated = _product(d_rows, mixed)
            if sums is not None:
                totals = sums.kernel.flatten(1), d_mixed.flatten(1)
                sums.scales[part] = self.sum_gradients(d_rows, d_modulated, x[part], kernel, scales[part], totals)
            if dx is not None:
                d_unfolding = _product(d_rows, flat).add_(self.modulated(d_modulated, kernel, scales[part]))
                dx[part] = self.folded(d_unfolding, x[part], kernel)
                del d_unfolding
            del d_modulated  # before the next one is made
        if sums is not None:
            sums.kernel.addcmul_(d_mixed, mixing)
            sums.mixing.copy_(d_mixed.mul_(kernel).sum(1, keepdim=True))

    def sum_gradients(
        self,
        d_rows: Tensor,
        d_modulated: Tensor,
        x: Tensor,
        kernel: Tensor,
        scales: Tensor,
        totals: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Add a chunk's part to `totals`, the gradients of K and of s K, and return the gradient of its scales."""
        unfolding = self.unfolded(x, kernel)
        modulated = self.modulated(unfolding, kernel, scales)
        d_rows = d_rows.t().contiguous()
        for total, seen in zip(totals, (unfolding, modulated), strict=True):
            total.add_(_product(d_rows, seen.t()))
        products = torch.mul(unfolding, d_modulated, out=modulated).view(len(x), -1, *kernel.shape[2:])
        return products.sum(1, keepdim=True, dtype=totals[0].dtype)

    def modulated(self, unfolding: Tensor, kernel: Tensor, scales: Tensor) -> Tensor:
        """A2 U: each sample's unfolding times its scales. Shapes: (n H'W', r h w C1/r) to the same."""
        samples = unfolding.view(len(scales), -1, *kernel.shape[1:])  # n, H'W', r, h w, C1/r
        return (samples * scales.to(unfolding.dtype)[:, None]).view(unfolding.shape)


def _product(a: Tensor, b: Tensor, more: Tensor | None = None) -> Tensor:
    """a b^T + more, by oneDNN where there is one: on some processors twice as fast as torch's BLAS.

    Shapes: a (P, Q), b (R, Q), more (P, R); result (P, R).
    """
    if linear_pointwise and a.is_cpu and a.dtype == torch.float32 and len(a) and torch.backends.mkldnn.enabled:
        if more is None:
            return linear_pointwise(a, b, None, "none", [], "")
        return linear_pointwise(a, more, b, None, "add")
    return a @ b.t() if more is None else torch.addmm(more, a, b.t())
