"""The fast attention backends compute the same as the reference, in less memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from augment_cli.layers import AAConv2d
from augment_cli.layers.aa import attention as attention_module
from augment_cli.layers.aa.attention import choose_backend, relative_attention
from augment_cli.layers.aa.blocked import blocked_relative_attention, free_blocks
from augment_cli.layers.aa.fused import fused_relative_attention
from tests.layers.helpers import peak_bytes

BACKENDS = {"blocked": blocked_relative_attention, "fused": fused_relative_attention}
drawn = settings(derandomize=True, deadline=None, max_examples=30)
each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    """Sizes of one case, the map rarely square, one row or one position included."""
    limits = {"n": 3, "heads": 3, "height": 9, "width": 9, "d": 5, "e": 4}
    return {name: draw(st.integers(1, limit), label=name) for name, limit in limits.items()}


def make_inputs(n=2, heads=2, height=6, width=5, d=4, e=3, *, dtype=torch.float64, scale=1.0, seed=0) -> list[Tensor]:
    """q, k, v as the layer passes them, views of one channels-first map, and two tables."""
    random = torch.Generator().manual_seed(seed)
    qkv = torch.randn(n, heads * (2 * d + e), height, width, generator=random, dtype=torch.float64) * scale
    tables = [torch.randn(2 * size - 1, d, generator=random, dtype=torch.float64) * scale for size in (height, width)]
    q, k, v = qkv.to(dtype).split([heads * d, heads * d, heads * e], dim=1)
    q, k, v = (t.unflatten(1, (heads, -1)).movedim(2, -1) for t in (q, k, v))
    return [t.detach().requires_grad_() for t in (q, k, v, *(table.to(dtype) for table in tables))]


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The result and the gradients of a sum that weighs every number of it differently."""
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max())


@drawn
@given(shapes())
def test_fused_is_the_reference(shape):
    inputs = make_inputs(**shape)
    assert_same(gradients(fused_relative_attention, inputs), gradients(relative_attention, inputs), 1e-10)


@drawn
@given(shapes(), st.integers(1, 40_000), st.sampled_from([0.1, 1.0, 30.0]))
def test_blocked_is_the_reference_for_any_block_size(shape, block_bytes, scale):
    inputs = make_inputs(**shape, scale=scale)
    blocked = partial(blocked_relative_attention, block_bytes=block_bytes)
    assert_same(gradients(blocked, inputs), gradients(relative_attention, inputs), 1e-10)


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["bounded", "largest subtracted"])
@pytest.mark.parametrize("block_bytes", [8 * 77 * 16, 8 * 77 * 77 * 2], ids=["some queries", "some heads"])
def test_ragged_last_blocks(block_bytes, scale):
    inputs = make_inputs(n=1, heads=5, height=7, width=11, scale=scale)
    blocked = partial(blocked_relative_attention, block_bytes=block_bytes)
    assert_same(gradients(blocked, inputs), gradients(relative_attention, inputs), 1e-10)


@each_backend
def test_gradcheck(backend):
    torch.autograd.gradcheck(backend, make_inputs(n=1, height=2, width=3, d=2, e=2))


@each_backend
def test_tables_made_for_another_resolution(backend):
    *maps, _, _ = make_inputs()
    inputs = [*maps, *make_inputs(height=4, width=9)[3:]]
    assert_same(gradients(backend, inputs), gradients(relative_attention, inputs), 1e-10)


@each_backend
def test_any_layout(backend):
    expected = gradients(relative_attention, inputs := make_inputs(n=2, heads=2))
    for order in ((0, 2, 3, 1, 4), (4, 3, 2, 1, 0), (0, 1, 2, 3, 4)):
        back = [order.index(axis) for axis in range(5)]
        laid = [t.detach().permute(order).contiguous().permute(back).requires_grad_() for t in inputs[:3]]
        assert_same(gradients(backend, [*laid, *inputs[3:]]), expected, 1e-10)


@each_backend
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)], ids=str
)
def test_lower_precision(backend, dtype, tolerance):
    exact = make_inputs(height=14, width=9, dtype=dtype)
    found = gradients(backend, exact)
    assert all(t.dtype == dtype for t in found)
    expected = gradients(relative_attention, [t.detach().double().requires_grad_() for t in exact])
    assert_same([t.double() for t in found], expected, tolerance)


def test_blocked_computes_half_precision_in_float32():
    """Only the inputs, the result and the gradients are rounded."""
    half = make_inputs(height=14, width=9, dtype=torch.bfloat16)
    found = gradients(blocked_relative_attention, half)[0]
    exact = relative_attention(*(t.detach().double() for t in half))
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


@each_backend
def test_autocast(backend):
    q, k, v, *tables = make_inputs(height=14, width=9, dtype=torch.float32)
    inputs = [*(t.detach().bfloat16().requires_grad_() for t in (q, k, v)), *tables]  # as after an autocast convolution
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(backend, inputs)
        expected = relative_attention(*inputs)
    assert found[0].dtype == expected.dtype == torch.bfloat16
    assert [t.dtype for t in found[1:]] == [t.dtype for t in inputs]
    exact = gradients(relative_attention, [t.detach().double().requires_grad_() for t in inputs])
    assert_same([t.double() for t in found], exact, 0.1)


def test_blocked_does_not_autocast_what_is_inside():
    inputs = make_inputs(height=14, width=9, dtype=torch.float32)
    expected = gradients(blocked_relative_attention, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(blocked_relative_attention, inputs)
    assert_same(found, expected, 0.0)


def test_blocked_takes_logits_that_would_overflow():
    q, k, v, rows, columns = make_inputs(dtype=torch.float32)
    inputs = [q * 1e4, k * 1e4, v, rows, columns]
    exact = relative_attention(*(t.double() for t in inputs))
    out = blocked_relative_attention(*inputs)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
def test_blocked_takes_large_values_whatever_the_logits(scale):
    """Up to both sides of the bound above which the largest logit is subtracted."""
    q, k, v, *tables = make_inputs(height=9, width=9, dtype=torch.float32, scale=scale)
    inputs = [q, k, v * 1e9, *tables]
    exact = relative_attention(*(t.double() for t in inputs))
    torch.testing.assert_close(blocked_relative_attention(*inputs).double(), exact, rtol=1e-4, atol=1e-4 * 1e9 * scale)


@each_backend
def test_a_nan_stays_one(backend):
    q, *others = make_inputs(dtype=torch.float32)
    q = q.detach().clone()
    q[0, 0, 0, 0, 0] = float("nan")
    out = backend(q, *others)
    assert out[0, 0, 0, 0].isnan().all()
    assert not out[1].isnan().any()


@each_backend
def test_empty_batch(backend):
    inputs = make_inputs(n=0)
    assert backend(*inputs).shape == (0, 2, 6, 5, 3)


def test_blocked_trains_in_a_tenth_of_the_memory():
    inputs = make_inputs(n=1, heads=2, height=56, width=56, d=20, e=1, dtype=torch.float32)
    plain = peak_bytes(partial(gradients, relative_attention, inputs))
    assert plain > 2 * 56**4 * 4  # logits of two heads, at the least
    assert peak_bytes(partial(gradients, blocked_relative_attention, inputs)) < plain / 10


def test_fused_infers_in_a_tenth_of_the_memory():
    inputs = [t.detach() for t in make_inputs(n=1, heads=2, height=56, width=56, d=20, e=1, dtype=torch.float32)]
    plain = peak_bytes(partial(relative_attention, *inputs))
    assert peak_bytes(partial(fused_relative_attention, *inputs)) < plain / 10


def test_blocked_memory_grows_with_the_positions():
    small, large = (make_inputs(n=1, heads=1, height=s, width=s, d=4, e=1, dtype=torch.float32) for s in (32, 64))
    small, large = (
        peak_bytes(partial(gradients, partial(blocked_relative_attention, block_bytes=1), inputs))
        for inputs in (small, large)
    )
    assert large < 8 * small  # four times the positions; the logits would be sixteen times


def test_blocks_kept_from_inference_serve_training():
    inputs = make_inputs(n=2, heads=2, height=6, width=5, dtype=torch.float32)
    free_blocks()
    with torch.inference_mode():
        blocked_relative_attention(*inputs)
    assert_same(gradients(blocked_relative_attention, inputs), gradients(relative_attention, inputs), 1e-4)


def test_blocks_are_kept_until_they_are_given_back():
    inputs = [t.detach() for t in make_inputs(n=2, heads=2, height=6, width=5, dtype=torch.float32)]
    fresh = peak_bytes(partial(blocked_relative_attention, *inputs))
    kept = peak_bytes(partial(blocked_relative_attention, *inputs), free=False)
    assert fresh - kept >= 2 * 30 * 30 * 4  # at the least a block of two heads
    assert peak_bytes(partial(blocked_relative_attention, *inputs)) == fresh


def test_threads_do_not_share_blocks():
    inputs = [[t.detach() for t in make_inputs(seed=seed, n=4, height=12, width=12)] for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensors: blocked_relative_attention(*tensors), inputs * 8))
    assert_same(found, [relative_attention(*tensors) for tensors in inputs] * 8, 1e-10)


def test_blocked_has_no_second_derivatives_and_says_what_has():
    inputs = make_inputs()
    first = torch.autograd.grad(blocked_relative_attention(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; set backend"):
        torch.autograd.grad(sum(t.square().sum() for t in first), inputs)


def test_blocked_under_functional_grad():
    inputs = [t.detach() for t in make_inputs()]
    found, expected = (
        torch.func.grad(lambda *a, backend=backend: backend(*a).square().sum(), argnums=(0, 1, 2, 3, 4))(*inputs)
        for backend in (blocked_relative_attention, relative_attention)
    )
    assert_same(found, expected, 1e-10)


def test_blocked_under_vmap_says_what_has_a_rule():
    inputs = [t.detach() for t in make_inputs()]
    with pytest.raises(RuntimeError, match=r"no rule for torch.func.vmap; set backend"):
        torch.func.vmap(lambda q: blocked_relative_attention(q, *inputs[1:]))(torch.stack([inputs[0]] * 2))


def test_blocked_in_forward_mode_says_what_has_it():
    inputs = tuple(t.detach() for t in make_inputs())
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative; set backend"):
        torch.func.jvp(blocked_relative_attention, inputs, inputs)


def test_fused_under_compile_and_export():
    inputs = [t.detach() for t in make_inputs()]
    expected = relative_attention(*inputs)
    compiled = torch.compile(fused_relative_attention, backend="eager", fullgraph=True)
    assert_same([compiled(*inputs)], [expected], 1e-10)

    class Core(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return fused_relative_attention(*tensors)

    exported = torch.export.export(Core(), tuple(inputs))
    assert_same([exported.module()(*inputs)], [expected], 1e-10)


def queries(size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 2, size, size, 4)


@pytest.mark.usefixtures("without_kernels")
def test_the_rule_takes_blocks_for_many_logits_and_the_reference_for_few():
    assert choose_backend(*[queries(7)] * 2) == "reference"
    assert choose_backend(*[queries(20)] * 2) == "blocked"
    assert choose_backend(*[queries(7, batch=64)] * 2) == "blocked"


def test_the_rule_takes_the_reference_where_blocks_cannot_go():
    assert choose_backend(*[queries(28).to("meta")] * 2) == "reference"
    with FakeTensorMode():
        assert choose_backend(*[torch.empty(1, 2, 28, 28, 4)] * 2) == "reference"
    seen = []
    torch.func.vmap(lambda q: seen.append(choose_backend(q, q)) or q)(queries(28).unsqueeze(0))
    assert seen == ["reference"]


@pytest.mark.usefixtures("without_kernels")
def test_compilers_and_exporters_are_given_what_they_can_follow():
    seen = []

    def backend(module, example):
        seen.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    layer = AAConv2d(8, 8, 3, padding=1, heads=2, key_channels=8, value_channels=4, resolution=28)
    x = torch.randn(1, 8, 28, 28)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert any("scaled_dot_product_attention" in target for target in seen)
    exported = torch.export.export(layer, (x,)).module()(x)
    for out in (compiled, exported):
        torch.testing.assert_close(out, layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "blocked", "fused"])
def test_a_layer_can_be_told_its_backend(backend, monkeypatch):
    layer = AAConv2d(8, 8, 3, padding=1, heads=2, key_channels=8, value_channels=4, resolution=5)
    layer.backend = backend
    called = []
    run = attention_module.BACKENDS[backend]
    monkeypatch.setitem(attention_module.BACKENDS, backend, lambda *args: called.append(backend) or run(*args))
    layer(torch.randn(1, 8, 5, 5))
    assert called == [backend]


def test_an_unknown_backend_is_refused_by_name():
    layer = AAConv2d(8, 8, 3, padding=1, heads=2, key_channels=8, value_channels=4, resolution=5)
    layer.backend = "flash"
    with pytest.raises(ValueError, match=r"'flash'.*'blocked'"):
        layer(torch.randn(1, 8, 5, 5))


@pytest.mark.parametrize("backend", ["blocked", "fused"])
def test_every_backend_computes_the_same_layer(backend):
    split = {"heads": 4, "key_channels": 16, "value_channels": 8}
    layer = AAConv2d(12, 16, 3, stride=2, padding=1, **split, resolution=(9, 13), dtype=torch.float64)
    x = torch.randn(2, 12, 18, 25, dtype=torch.float64)
    expected = layer(x)
    layer.backend = backend
    assert (layer(x) - expected).abs().max() < 1e-10
