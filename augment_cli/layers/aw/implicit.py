"""AW's convolution by Triton kernels. `triton/attended_kernels.py` describes the algorithm."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from augment_cli.layers.aw.backend import Arranged, ConvBackend, Sums


@dataclass(frozen=True)
class Triton(ConvBackend):
    """Kernels in the order C2, h w, C1/r, r: input channels are neighbours in memory, as in torch's channels-last."""

    name = "triton"

    @staticmethod
    def arranged(kernel: Tensor, mixing: Tensor, scales: Tensor) -> Arranged:
        kernel = kernel.unflatten(1, (len(mixing), -1)).flatten(3).permute(0, 3, 1, 2).contiguous()
        mixing = mixing.t()[:, None, :, None].contiguous()
        return kernel, mixing, scales.flatten(2).transpose(1, 2)[..., None].contiguous()

    def natural(self, kernels: Tensor) -> Tensor:
        """(..., C2, h w, C1/r, r) to (..., C2, C1, h, w)."""
        return kernels.flatten(-2).transpose(-1, -2).unflatten(-1, self.geometry.size)

    def run(self, x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor, out: Tensor) -> None:
        from augment_cli.layers.triton import attended

        with _channels_last(out) as place:
            attended.forward(*_inputs(x, kernel, mixing, scales), self.geometry, place)

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
        from augment_cli.layers.triton import attended

        inputs, d_out = _inputs(x, kernel, mixing, scales), d_out.contiguous(memory_format=torch.channels_last)
        if dx is not None:
            with _channels_last(dx) as place:
                attended.maps_backward(d_out, inputs, self.geometry, place)
        if sums is not None:
            for total, found in zip(sums, attended.kernel_backward(d_out, inputs, self.geometry), strict=True):
                total.copy_(found.view(total.shape))


def _inputs(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes: from those that `arranged` gives to those that `triton.attended.forward` takes."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x, kernel.contiguous(), mixing.contiguous().flatten(1), scales.contiguous().flatten(2)


@contextmanager
def _channels_last(maps: Tensor) -> Iterator[Tensor]:
    """Channels-last maps to write to. If the given ones are not, they get a copy at the end.

    The kernels take any strides, but read and write channels side by side.
    """
    if maps.is_contiguous(memory_format=torch.channels_last):
        yield maps
    else:
        place = torch.empty_like(maps, memory_format=torch.channels_last)
        yield place
        maps.copy_(place)
