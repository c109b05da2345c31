"""AW's convolution by Triton kernels. `triton/attended_kernels.py` describes the algorithm."""

from dataclasses import dataclass

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

        attended.forward(*_inputs(x, kernel, mixing, scales), self.geometry, out)

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

        inputs = _inputs(x, kernel, mixing, scales)
        if dx is not None:
            attended.maps_backward(d_out, inputs, self.geometry, dx)
        if sums is not None:
            for total, found in zip(sums, attended.kernel_backward(d_out, inputs, self.geometry), strict=True):
                total.copy_(found.view(total.shape))


def _inputs(x: Tensor, kernel: Tensor, mixing: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes: from those that `arranged` gives to those that `triton.attended.forward` takes."""
    return x, kernel.contiguous(), mixing.contiguous().flatten(1), scales.contiguous().flatten(2)
