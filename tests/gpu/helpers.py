"""Devices, precisions and comparisons of the GPU tests.

The same tests run on CUDA and, with small maps, on a CPU, where Triton's kernels run in its interpreter.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.layers.helpers import needs_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
COMPILER = "inductor" if CUDA else "aot_eager"

needs_cuda = pytest.mark.skipif(not CUDA, reason="there is no NVIDIA GPU here")


def on_cuda(*values) -> object:
    """A test's parameters that are too large for a CPU."""
    return pytest.param(*values, marks=needs_cuda)


def backends(*names: str) -> list:
    return [pytest.param(name, marks=needs_triton if name == "triton" else ()) for name in names]


class Precision(NamedTuple):
    """A dtype of maps and parameters, autocast or none, TF32 or none, and the relative distance that is allowed."""

    dtype: torch.dtype
    amp: torch.dtype | None
    tf32: bool
    tolerance: float


PRECISIONS = {
    "float32": Precision(torch.float32, None, False, 2e-5),
    "tf32": Precision(torch.float32, None, True, 5e-3),
    "bfloat16": Precision(torch.bfloat16, None, False, 5e-2),
    "float16": Precision(torch.float16, None, False, 1e-2),
    "amp-bfloat16": Precision(torch.float32, torch.bfloat16, False, 5e-2),
    "amp-float16": Precision(torch.float32, torch.float16, False, 1e-2),
}


@contextmanager
def as_asked(precision: Precision) -> Iterator[None]:
    """TF32 in matrix products and convolutions, or none; and autocast."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [flag.fp32_precision for flag in flags]
    for flag in flags:
        flag.fp32_precision = "tf32" if precision.tf32 else "ieee"
    try:
        with torch.autocast(DEVICE, precision.amp) if precision.amp else nullcontext():
            yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


Results = dict[str, Tensor]
"""The result of a module, and the gradients of its input and parameters, by name."""


def results(module: Callable[[Tensor], Tensor], x: Tensor, parameters: dict[str, Tensor]) -> Results:
    """The gradients are those of a sum that weighs every number of the result differently."""
    x = x.detach().requires_grad_()
    out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), [x, *parameters.values()])
    return dict(zip(("out", "x", *parameters), (out.detach(), *gradients), strict=True))


def run(
    module: nn.Module,
    x: Tensor,
    precision: Precision = PRECISIONS["float32"],
    runner: Callable[[Tensor], Tensor] | None = None,
) -> Results:
    """Results in a precision. `runner` is what is called, if it is not the module itself."""
    module.to(precision.dtype)
    with as_asked(precision):
        return results(module if runner is None else runner, x.to(precision.dtype), dict(module.named_parameters()))


def exact(module: nn.Module, x: Tensor, backend: str | None = None) -> Results:
    """Results in float64 on the CPU, by a backend of plain operations."""
    twin = copy.deepcopy(module).cpu().double()
    if backend is not None:
        twin.backend = backend
    return results(twin, x.detach().cpu().double(), dict(twin.named_parameters()))


def distances(found: Results, expected: Results) -> dict[str, float]:
    """Relative distances, by name."""
    assert found.keys() == expected.keys()
    assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in expected.items()}
    return {
        name: float((found[name].cpu().double() - t.cpu().double()).norm() / t.cpu().double().norm().clamp(min=1e-30))
        for name, t in expected.items()
    }


def assert_near(found: Results, expected: Results, tolerance: float) -> None:
    off = {name: distance for name, distance in distances(found, expected).items() if not distance <= tolerance}
    assert not off, f"farther than {tolerance}: {off}"


def assert_same_bits(found: Results, expected: Results) -> None:
    different = [name for name, t in expected.items() if not torch.equal(found[name], t)]
    assert not different
