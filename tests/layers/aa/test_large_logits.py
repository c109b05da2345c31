"""Gradients at large logits are as near to float64 as those of the plain operations in float32."""

import math

import pytest
import torch
from torch import Tensor

from augment_cli.layers.aa.attention import relative_attention
from augment_cli.layers.aa.blocked import blocked_relative_attention
from augment_cli.layers.aa.compiled import native_relative_attention
from tests.layers.aa.test_backends import gradients, make_inputs
from tests.layers.helpers import needs_kernels

NAMES = "out", "q", "k", "v", "rel_height", "rel_width"
each_backend = pytest.mark.parametrize(
    "backend",
    [
        blocked_relative_attention,
        pytest.param(native_relative_attention, marks=needs_kernels),
    ],
)


def far_apart(size: float, seed: int) -> list[Tensor]:
    """Logits of about `size`: at 10^4 a few queries look at two keys, at 10^6 and more each looks at one."""
    *inputs, v, height, width = make_inputs(height=9, width=9, d=20, e=4, dtype=torch.float32, seed=seed)
    q, k, height, width = (t.detach() * math.sqrt(size) for t in (*inputs, height, width))
    return [q, k, v, height, width]


def close_together(size: float, seed: int) -> list[Tensor]:
    """Logits of about `size` that differ by some hundred at most: every query looks at several keys."""
    q, k, v, *tables = (t.detach() for t in make_inputs(height=9, width=9, d=20, e=4, dtype=torch.float32, seed=seed))
    return [q.abs() * size / 4, 1 + (k / 1e3 - 1) * 1e3 / size, v, *(torch.zeros_like(t) for t in tables)]


def errors(backend, inputs: list[Tensor]) -> Tensor:
    """Largest absolute error of the result and of every gradient."""
    exact = gradients(relative_attention, [t.detach().double().requires_grad_() for t in inputs])
    found = gradients(backend, [t.detach().clone().requires_grad_() for t in inputs])
    return torch.stack([(a.double() - b).detach().abs().max() for a, b in zip(found, exact, strict=True)])


@each_backend
@pytest.mark.parametrize("make", [far_apart, close_together])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e6, 1e8])
def test_gradients_are_as_near_as_those_of_plain_operations(backend, make, size):
    inputs = [make(size, seed) for seed in range(6)]
    found, plain = (
        sum(errors(run, tensors) for tensors in inputs) / len(inputs) for run in (backend, relative_attention)
    )
    for name, a, b in zip(NAMES, found, plain, strict=True):
        assert a <= 6 * b + 1e-7, f"{name}: {a:.1e} where the plain operations are {b:.1e} off"


@each_backend
def test_a_query_that_looks_at_one_key_passes_no_gradient_to_the_logits(backend):
    """Rounding errors of the values would be multiplied by queries of 10^4."""
    for grad in gradients(backend, [t.requires_grad_() for t in far_apart(1e8, 0)])[1:3]:
        assert grad.abs().max() < 1e-20


@each_backend
@pytest.mark.parametrize("scale", [0.1, 1.0, 2.0])
def test_tiny_gradients_keep_their_digits(backend, scale):
    """Sums of weights up to 2^60 divide them, and could push them out of float32's range."""
    inputs = make_inputs(height=9, width=9, d=20, dtype=torch.float32, scale=scale)
    exact = gradients(relative_attention, [t.detach().double().requires_grad_() for t in inputs])
    out = backend(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape) * 1e-30
    for found, expected in zip(torch.autograd.grad((out * weights).sum(), inputs), exact[1:], strict=True):
        assert (found.double() * 1e30 - expected).abs().max() <= 1e-3 * expected.abs().max()
