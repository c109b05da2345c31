"""AW's convolution for some samples at a time, one group of a convolution for each sample."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from augment_cli.layers.aw.backend import Sums, UsualOrder
from augment_cli.layers.aw.per_sample import as_channels, conv_of_each

KERNELS_BYTES = 2_400_000
"""Bytes of the samples' kernels, and of the samples, in one chunk; a chunk is at least one sample. Chosen on the
machine of benchmarks/results/layers-1-thread.json."""


@dataclass(frozen=True)
class Chunked(UsualOrder):
    """One grouped convolution for each chunk of samples, whose kernels are formed when its turn comes."""

    name = "chunked"

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        for part, _, kernels in self.chunks(x, kernel, mixing, scales):
            out[part] = conv_of_each(x[part], self.natural(kernels.to(x.dtype)), self.geometry)

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
        for part, factors, kernels in self.chunks(x, kernel, mixing, scales):
            samples, natural = len(factors), self.natural(kernels.to(x.dtype)).flatten(0, 1)
            tensors = as_channels(d_out[part]), as_channels(x[part]), natural, None
            wanted = [dx is not None, sums is not None, False]
            options = *self.geometry.options, False, [0, 0], samples, wanted
            dx_part, d_kernels, _ = torch.ops.aten.convolution_backward(*tensors, *options)
            if dx is not None:
                dx[part] = dx_part.view(dx[part].shape)
            if sums is not None:
                d_kernels = d_kernels.view(samples, *kernel.shape).to(sums.kernel.dtype)
                d_factors = (d_kernels * kernel).sum(3, keepdim=True)
                sums.kernel.add_(d_kernels.mul_(factors).sum(0))
                sums.mixing.add_((d_factors * scales[part, None]).sum((0, 4), keepdim=True)[0])
                sums.scales[part] = (d_factors * mixing).sum(1)

    def chunks(
        self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each chunk of samples: which samples, their factors 1 + s A2, and their kernels K_n."""
        largest = max(kernel.numel() * kernel.element_size(), x.shape[1:].numel() * x.element_size())
        size = max(KERNELS_BYTES // largest, 1)
        for start in range(0, len(scales), size):
            part = slice(start, start + size)
            factors = torch.addcmul(mixing.new_ones(()), mixing, scales[part, None])
            yield part, factors, kernel * factors
