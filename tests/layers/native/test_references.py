"""The C++ references agree with the formulas in float64, and the fast kernels with the references in float32."""

import ctypes
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from augment_cli.layers import native
from augment_cli.layers.aa.attention import relative_attention
from augment_cli.layers.geometry import Geometry
from augment_cli.layers.native import attended, attention
from tests.layers.helpers import needs_kernels, normal, pairs, seeds

pytestmark = needs_kernels
drawn = settings(derandomize=True, deadline=None, max_examples=60)
Tensors = list[Tensor]


def call(name: str, before: list, tensors: Tensors, after: list) -> None:
    """Call a C++ reference; tensors are float64 and dense."""
    assert all(t.dtype == torch.float64 and t.is_contiguous() for t in tensors)
    function = getattr(native.library.functions, name)
    function.restype = None
    function(*before, *(ctypes.c_void_p(t.data_ptr()) for t in tensors), *(ctypes.c_int(n) for n in after))


def assert_near(found: Tensors, expected: Tensors, tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


# ---- attention


def attention_reference(q: Tensor, k: Tensor, v: Tensor, rel_height: Tensor, rel_width: Tensor, d_out: Tensor):
    """The result and the gradients of the five inputs."""
    (n, heads, d, positions), e = q.shape, v.shape[2]
    sizes = [n, heads, d, e, (len(rel_height) + 1) // 2, (len(rel_width) + 1) // 2]
    inputs, room = [q, k, v, rel_height, rel_width], q.new_empty(positions)
    out, grads = torch.empty_like(v), [torch.zeros_like(t) for t in inputs]
    call("attention_forward_reference", [], [*inputs, out, room], sizes)
    call("attention_backward_reference", [], [*inputs, d_out, *grads, room], sizes)
    return [out, *grads]


def attention_inputs(n: int, heads: int, d: int, e: int, height: int, width: int, scale: float, seed: int) -> Tensors:
    """q, k (N, heads, d, HW), v (N, heads, e, HW), tables, and the gradient of the result."""
    maps = [normal(n, heads, c, height * width, seed=seed + i) * scale for i, c in enumerate((d, d, e))]
    tables = [normal(2 * size - 1, d, seed=seed + 3 + i) * scale for i, size in enumerate((height, width))]
    return [*maps, *tables, normal(n, heads, e, height * width, seed=seed + 5)]


attention_sizes = st.fixed_dictionaries(
    {
        "n": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "d": st.integers(1, 23),
        "e": st.integers(1, 9),
        "height": st.integers(1, 15),
        "width": st.integers(1, 15),
        "scale": st.sampled_from([0.1, 1.0, 3.0]),
        "seed": seeds,
    }
)


@drawn
@given(attention_sizes)
def test_fast_attention_is_the_reference(sizes):
    *inputs, d_out = attention_inputs(**sizes)
    expected = attention_reference(*inputs, d_out)
    floats = [t.float() for t in inputs]
    out, shifts, sums = attention.forward(*floats)
    found = [out, *attention.backward(d_out.float(), *floats, out, shifts, sums)]
    assert_near(found, expected, 1e-4 * max(1.0, sizes["scale"] ** 2))


@drawn
@given(attention_sizes)
def test_the_attention_reference_is_the_formula(sizes):
    *inputs, d_out = attention_inputs(**sizes)
    found, size = attention_reference(*inputs, d_out), (sizes["height"], sizes["width"])
    leaves = [t.clone().requires_grad_() for t in inputs]
    maps = [t.unflatten(3, size).movedim(2, -1) for t in leaves[:3]]
    out = relative_attention(*maps, *leaves[3:]).movedim(-1, 2).flatten(3)
    assert_near(found, [out, *torch.autograd.grad(out, leaves, d_out)], 1e-10)


# ---- AW's convolution


def convolution_reference(inputs: Tensors, geometry: Geometry, d_out: Tensor) -> Tensors:
    """The result and the gradients of x, K, s and A2."""
    numbers, _, _ = attended._arguments(tuple(inputs), geometry)
    out, grads = torch.empty_like(d_out), [torch.zeros_like(t) for t in inputs]
    call("attended_forward_reference", [ctypes.byref(numbers)], [*inputs, out], [])
    call("attended_backward_reference", [ctypes.byref(numbers)], [*inputs, d_out, *grads], [])
    return [out, *grads]


@st.composite
def convolutions(draw: st.DrawFn, channels: tuple[int, ...], reductions: tuple[int, ...]) -> tuple[Tensors, Geometry]:
    """x (N, C1, H, W), K (C2, C1 h w), s (C1/r, C2), A2 (N, C1/r, h w), the result's gradient; and the geometry."""
    c1, c2, r = draw(st.sampled_from(channels)), draw(st.sampled_from(channels)), draw(st.sampled_from(reductions))
    size, stride, padding, dilation = (
        draw(pairs(*values).map(lambda n: n if isinstance(n, tuple) else (n, n)))
        for values in ((1, 2, 3), (1, 2, 3), (0, 1, 2), (1, 2))
    )
    geometry = Geometry(size, stride, padding, dilation)
    reach = [d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True)]
    height, width = (draw(st.integers(n, n + 5)) for n in reach)
    n, seed, taps = draw(st.integers(1, 2)), draw(seeds), math.prod(size)
    shapes = (n, c1, height, width), (c2, c1 * taps), (c1 // r, c2), (n, c1 // r, taps)
    inputs = [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    inputs[1] *= (c1 * taps) ** -0.5
    return [*inputs, normal(n, c2, *geometry.out_size(inputs[0]), seed=seed + 4)], geometry


@drawn
@given(convolutions(channels=(32, 64), reductions=(16,)))
def test_the_fast_convolution_is_the_reference(case):
    (*inputs, d_out), geometry = case
    expected = convolution_reference(inputs, geometry, d_out)
    floats = tuple(t.float() for t in inputs)
    out, (dx, *rest) = torch.empty_like(d_out, dtype=torch.float32), [torch.empty_like(t) for t in floats]
    attended.forward(*floats, geometry, out)
    attended.backward(d_out.float(), floats, geometry, dx, tuple(rest))
    assert_near([out, dx, *rest], expected, 1e-5)


@drawn
@given(convolutions(channels=(4, 6, 8), reductions=(1, 2)))
def test_the_convolution_reference_is_the_formula(case):
    (*inputs, d_out), geometry = case
    found = convolution_reference(inputs, geometry, d_out)
    x, kernel, mixing, scales = leaves = [t.clone().requires_grad_() for t in inputs]
    c1, taps = x.shape[1], math.prod(geometry.size)
    factors = 1 + torch.einsum("go,ngt->nogt", mixing, scales).repeat_interleave(c1 // len(mixing), dim=2)
    kernels = (kernel.view(-1, c1, taps) * factors).unflatten(3, geometry.size)
    samples = (
        torch.nn.functional.conv2d(one[None], of_one, None, *geometry.options)
        for one, of_one in zip(x, kernels, strict=True)
    )
    out = torch.cat(list(samples))
    assert_near(found, [out, *torch.autograd.grad(out, leaves, d_out)], 1e-10)
