"""The compiled attention kernel computes what the formula says, in float32, with either instruction set."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.layers.aa.attention import choose_backend, relative_attention
from augment_cli.layers.aa.compiled import native_relative_attention
from tests.layers.aa.test_backends import assert_same, gradients, make_inputs
from tests.layers.helpers import needs_kernels, peak_bytes, seeds

pytestmark = needs_kernels
drawn = settings(derandomize=True, deadline=None, max_examples=80)

maps = st.fixed_dictionaries(
    {
        "n": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "height": st.integers(1, 24),
        "width": st.integers(1, 24),
        "d": st.integers(1, 35),
        "e": st.integers(1, 9),
        "seed": seeds,
    }
)


def exact(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return gradients(relative_attention, [t.detach().double().requires_grad_() for t in inputs])


@drawn
@given(maps, st.sampled_from([0.1, 1.0, 4.0]))
def test_attention_is_the_reference(shape, scale):
    inputs = make_inputs(**shape, scale=scale, dtype=torch.float32)
    found = gradients(native_relative_attention, inputs)
    assert_same([t.double() for t in found], exact(inputs), 1e-4 * max(1.0, scale**2))


def test_large_maps_in_many_chunks():
    inputs = make_inputs(n=1, heads=2, height=41, width=37, d=20, e=3, dtype=torch.float32)
    assert_same([t.double() for t in gradients(native_relative_attention, inputs)], exact(inputs), 1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads):
    inputs = make_inputs(n=2, heads=3, height=9, width=11, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same([t.double() for t in gradients(native_relative_attention, inputs)], exact(inputs), 1e-5)
    finally:
        torch.set_num_threads(before)


def test_any_layout():
    inputs = make_inputs(dtype=torch.float32)
    expected = exact(inputs)
    for order in ((0, 2, 3, 1, 4), (4, 3, 2, 1, 0), (0, 1, 2, 3, 4)):
        back = [order.index(axis) for axis in range(5)]
        laid = [t.detach().permute(order).contiguous().permute(back).requires_grad_() for t in inputs[:3]]
        found = gradients(native_relative_attention, [*laid, *inputs[3:]])
        assert_same([t.double() for t in found], expected, 1e-5)


def test_tables_made_for_another_resolution():
    *qkv, _, _ = make_inputs(dtype=torch.float32)
    inputs = [*qkv, *make_inputs(height=4, width=9, dtype=torch.float32)[3:]]
    assert_same([t.double() for t in gradients(native_relative_attention, inputs)], exact(inputs), 1e-5)


@pytest.mark.parametrize("size", [1e4, 1e12])
def test_logits_that_would_overflow(size):
    q, k, v, *tables = (t.detach() for t in make_inputs(dtype=torch.float32))
    inputs = [q * size, k * size, v, *tables]
    expected = relative_attention(*(t.double() for t in inputs))
    torch.testing.assert_close(native_relative_attention(*inputs).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
def test_large_values_whatever_the_logits(scale):
    """Up to both sides of the sums from which the largest logit is subtracted."""
    q, k, v, *tables = make_inputs(height=9, width=9, dtype=torch.float32, scale=scale)
    inputs = [q, k, v * 1e9, *tables]
    expected = relative_attention(*(t.double() for t in inputs))
    torch.testing.assert_close(
        native_relative_attention(*inputs).double(), expected, rtol=1e-4, atol=1e-4 * 1e9 * scale
    )


def test_a_nan_stays_one():
    q, *others = (t.detach() for t in make_inputs(dtype=torch.float32))
    q[0, 0, 0, 0, 0] = float("nan")
    out = native_relative_attention(q, *others)
    assert out[0, 0, 0, 0].isnan().all()
    assert not out[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    half = make_inputs(height=14, width=9, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(native_relative_attention, half)
    assert {t.dtype for t in found} == {dtype}
    expected = relative_attention(*(t.detach().double() for t in half))
    torch.testing.assert_close(found[0].double(), expected, rtol=2**-8, atol=1e-6)


def test_what_attention_cannot_do_it_says():
    inputs = make_inputs(dtype=torch.float32)
    first = torch.autograd.grad(native_relative_attention(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; set backend"):
        torch.autograd.grad(sum(t.square().sum() for t in first), inputs)
    with pytest.raises(ValueError, match=r"at most 32 bits.*set backend"):
        native_relative_attention(*make_inputs())


def test_attention_trains_in_a_hundredth_of_the_memory():
    inputs = make_inputs(n=1, heads=2, height=56, width=56, d=20, e=1, dtype=torch.float32)
    logits = 2 * 56**4 * 4
    assert peak_bytes(partial(gradients, native_relative_attention, inputs)) < 2 * logits / 10


def test_the_rule_takes_the_kernel_for_attention():
    q = make_inputs(dtype=torch.float32)[0]
    assert choose_backend(q, q) == choose_backend(q.bfloat16(), q) == "native"
    assert choose_backend(q.double(), q) == choose_backend(q.to("meta"), q) == "reference"


def test_empty_batch():
    assert native_relative_attention(*make_inputs(n=0, dtype=torch.float32)).shape == (0, 2, 6, 5, 3)


def test_several_calls_at_once():
    heads = [[t.detach() for t in make_inputs(seed=i, height=9, dtype=torch.float32)] for i in range(8)]
    expected = [native_relative_attention(*qkv) for qkv in heads]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda qkv: native_relative_attention(*qkv), heads * 4))
    for a, b in zip(found, expected * 4, strict=True):
        torch.testing.assert_close(a, b)
