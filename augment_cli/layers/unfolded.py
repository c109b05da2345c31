"""The two ways of AW's convolution by products of matrices, as `augment_cli.layers.attended` describes them."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from augment_cli.layers.per_sample import Way

BLOCK_BYTES = 2_400_000
"""Size of the rows of K_n that `unfolded` forms at a time, for each thread. Measured: best of 0.6 to 9.6 MB."""

CHUNK_BYTES = 8_000_000
"""Size of the unfolding of the samples that `unfolded` and `static` unfold at a time; one at the least."""


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
class Unfolded(_InUnfoldings, Way):
    """A sample by products of two matrices, K_n formed some rows at a time in a place that all of them share."""

    name = "unfolded"

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        place = self.place(kernel)
        for chunk in self.chunks(x, kernel):
            for n, unfolding in enumerate(self.unfoldings(x[chunk], kernel), chunk.start):
                for part, _, formed in self.blocks(kernel, mixing, scales[n], place):
                    out[n, part] = _product(unfolding, formed.to(x.dtype)).t().view(-1, *out.shape[2:])

    def gradients(self, d_out, x, kernel, mixing, scales, dx: Tensor | None, sums: list[Tensor]) -> None:
        place = self.place(kernel)
        for chunk in self.chunks(x, kernel):
            unfoldings = self.unfoldings(x[chunk], kernel)
            d_unfoldings = []
            for n, unfolding in enumerate(unfoldings, chunk.start):
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
class Static(_InUnfoldings, Way):
    """Samples together: U by K and A2 U by s K."""

    name = "static"

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
