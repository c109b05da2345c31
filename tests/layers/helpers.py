"""Helpers that the layers' tests share."""

import os
from collections.abc import Callable, Iterable
from importlib.metadata import version

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from augment_cli.layers import native, triton
from augment_cli.layers.aa.blocked import free_blocks

seeds = st.integers(0, 2**31)
needs_kernels = pytest.mark.skipif(
    native.library is None and os.environ.get("AUGMENT_NATIVE") != "1",
    reason="no kernels were compiled; AUGMENT_NATIVE=1 makes that an error",
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETER = triton.INSTALLED and version("triton") >= "3.7" and triton.is_interpreted()
needs_triton = pytest.mark.skipif(
    not (INTERPRETER or (triton.INSTALLED and DEVICE == "cuda")),
    reason="Triton is not installed, or has an interpreter that does not take NumPy 2.4 yet",
)
needs_interpreter = pytest.mark.skipif(not INTERPRETER, reason="only Triton's interpreter takes CPU tensors")


def for_cpu(names: Iterable[str]) -> list:
    """Names of backends as a test's parameters: those that this machine has no kernels for are skipped on CPUs."""
    marks = {"native": needs_kernels, "triton": needs_interpreter}
    return [pytest.param(name, marks=marks.get(name.split()[-1], ())) for name in names]


def pairs(*values: int) -> st.SearchStrategy:
    """One of the values for both axes, or one for each."""
    return st.sampled_from(values) | st.tuples(st.sampled_from(values), st.sampled_from(values))


def randomised(layer: nn.Module, seed: int) -> nn.Module:
    """Draw parameters around 1/2, so that ReLUs are open and no part is zero, and shuffle channel orders."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.5, generator=generator)
        for name, buffer in layer.named_buffers():
            if name.endswith("channel_order"):
                buffer.copy_(torch.randperm(len(buffer), generator=generator))
    return layer


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def assert_gradients(layer: nn.Module, x: Tensor) -> None:
    """Analytic gradients are the numeric ones, for the input and for every parameter."""
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, [t.detach().clone().requires_grad_() for t in (x, *parameters)])


def peak_bytes(function: Callable[[], object], free: bool = True) -> int:
    """Most bytes that tensors made by a call held at one time: with what the layers keep, if that is freed before."""
    if free:
        free_blocks()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
