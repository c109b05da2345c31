"""The Triton kernels of AA compute what the formula says: on a GPU, or without one in Triton's interpreter.

tests/conftest.py asks for the interpreter where there is no GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from augment_cli.layers import AAConv2d, triton
from augment_cli.layers.aa.attention import attention, choose_backend, relative_attention
from augment_cli.layers.aa.tiled import triton_relative_attention
from tests.layers.aa import test_backends
from tests.layers.aa.test_backends import assert_same, gradients
from tests.layers.aa.test_large_logits import close_together, far_apart
from tests.layers.helpers import DEVICE, needs_triton, seeds

pytestmark = needs_triton
drawn = settings(derandomize=True, deadline=None, max_examples=8)


def make_inputs(n=1, heads=2, height=4, width=3, d=4, e=3, *, dtype=torch.float32, **options) -> list[Tensor]:
    inputs = test_backends.make_inputs(n, heads, height, width, d, e, dtype=dtype, **options)
    return [t.detach().to(DEVICE).requires_grad_() for t in inputs]


def exact(inputs: list[Tensor]) -> list[Tensor]:
    return list(gradients(relative_attention, [t.detach().cpu().double().requires_grad_() for t in inputs]))


def assert_near(inputs: list[Tensor], tolerance: float) -> None:
    found = gradients(triton_relative_attention, inputs)
    assert [t.dtype for t in found[1:]] == [t.dtype for t in inputs]
    assert_same([t.cpu().double() for t in found], exact(inputs), tolerance)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    limits = {"n": 2, "heads": 2, "height": 11, "width": 11, "d": 35, "e": 18}
    return {name: draw(st.integers(1, limit), label=name) for name, limit in limits.items()}


@drawn
@given(shapes(), st.sampled_from([0.1, 1.0, 3.0]), seeds)
def test_attention_is_the_reference(shape, scale, seed):
    assert_near(make_inputs(**shape, scale=scale, seed=seed), 1e-5 * max(1.0, scale**2))


@pytest.mark.parametrize("size", [(1, 20), (17, 2), (12, 14)], ids=str)
def test_maps_of_several_tiles(size):
    height, width = size
    assert_near(make_inputs(n=1, heads=1, height=height, width=width, d=20, e=2), 1e-5)


@pytest.mark.parametrize(("d", "e"), [(33, 64), (2, 128), (128, 100)])
def test_wide_heads(d, e):
    assert_near(make_inputs(n=1, heads=1, height=6, width=7, d=d, e=e, scale=0.5), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)], ids=str)
def test_half_precision_sums_in_float32(dtype, tolerance):
    inputs = make_inputs(1, 2, 9, 9, d=20, e=3, dtype=dtype)
    assert_near(inputs, tolerance)
    out = triton_relative_attention(*inputs).cpu().double()
    assert (out - exact(inputs)[0]).abs().mean() < torch.finfo(dtype).eps / 2


def test_any_layout():
    inputs = make_inputs()
    expected = exact(inputs)
    for order in ((0, 2, 3, 1, 4), (4, 3, 2, 1, 0), (0, 1, 2, 3, 4)):
        back = [order.index(axis) for axis in range(5)]
        laid = [t.detach().permute(order).contiguous().permute(back).requires_grad_() for t in inputs[:3]]
        found = gradients(triton_relative_attention, [*laid, *inputs[3:]])
        assert_same([t.cpu().double() for t in found], expected, 1e-5)


@pytest.mark.parametrize(
    ("d", "layout", "found"),
    [
        (20, torch.channels_last, 4),
        (16, torch.channels_last, 8),
        (3, torch.channels_last, 1),
        (20, torch.contiguous_format, 1),
    ],
)
def test_channels_side_by_side_are_loaded_together(d, layout, found):
    from augment_cli.layers.triton.attention import aligned

    maps = torch.zeros(2, 4 * 2 * d, 5, 6).to(memory_format=layout).flatten(2).split(4 * d, dim=1)
    assert aligned(*(t.unflatten(1, (4, d)) for t in maps)) == found


def test_tables_made_for_another_resolution():
    *maps, _, _ = make_inputs()
    assert_near([*maps, *make_inputs(height=3, width=9)[3:]], 1e-5)


def test_results_repeat_bit_for_bit():
    inputs = make_inputs(1, 1, height=9, width=9, d=20)
    for a, b in zip(*(gradients(triton_relative_attention, inputs) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    q, k, v, *tables = (t.detach() for t in make_inputs(n=3))
    together = triton_relative_attention(q, k, v, *tables)
    for i in range(3):
        assert torch.equal(triton_relative_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], *tables)[0], together[i])


@pytest.mark.parametrize("make", [far_apart, close_together])
@pytest.mark.parametrize("size", [1e3, 1e8])
def test_gradients_at_large_logits_are_as_near_as_those_of_plain_operations(make, size):
    inputs = one_head(make(size, 0))
    found, plain = (errors(run, inputs) for run in BOTH)
    assert (found <= 6 * plain + 1e-7).all(), f"{found} where plain operations are {plain} off"


def one_head(inputs: list[Tensor]) -> list[Tensor]:
    *maps, height, width = (t.to(DEVICE) for t in inputs)
    return [*(t[:1, :1] for t in maps), height, width]


BOTH = triton_relative_attention, relative_attention


def errors(backend, inputs: list[Tensor]) -> Tensor:
    """Largest absolute error of the result and of every gradient."""
    found = gradients(backend, [t.detach().requires_grad_() for t in inputs])
    expected = exact(inputs)
    return torch.stack([(a.cpu().double() - b).detach().abs().max() for a, b in zip(found, expected, strict=True)])


def test_a_query_that_looks_at_one_key_passes_no_gradient_to_the_logits():
    inputs = [t.requires_grad_() for t in one_head(far_apart(1e8, 0))]
    for grad in gradients(triton_relative_attention, inputs)[1:3]:
        assert grad.abs().max() < 1e-20


def test_tiny_gradients_keep_their_digits():
    inputs = make_inputs(1, 1, height=9, width=9, d=20)
    out = triton_relative_attention(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape) * 1e-30
    for found, expected in zip(torch.autograd.grad((out * weights).sum(), inputs), exact(inputs)[1:], strict=True):
        assert (found.cpu().double() * 1e30 - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_logits_that_would_overflow_an_exponential():
    q, k, v, *tables = (t.detach() for t in make_inputs())
    inputs = [q * 1e6, k * 1e6, v * 1e9, *tables]
    expected = relative_attention(*(t.cpu().double() for t in inputs))
    torch.testing.assert_close(
        triton_relative_attention(*inputs).cpu().double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
    )


def test_a_nan_stays_one():
    q, *others = (t.detach() for t in make_inputs())
    q[0, 0, 0, 0, 0] = float("nan")
    out = triton_relative_attention(q, *others)
    assert out[0, 0, 0, 0].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_empty_batch():
    inputs = make_inputs(n=0)
    out = triton_relative_attention(*inputs)
    assert out.shape == (0, 2, 4, 3, 3)
    for grad, t in zip(torch.autograd.grad(out.sum(), inputs), inputs, strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


def test_autocast_changes_nothing():
    inputs = make_inputs()
    expected = gradients(triton_relative_attention, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(triton_relative_attention, inputs)
    assert_same(found, expected, 0.0)


def test_parameters_stay_float32_beside_maps_in_half_precision():
    """As after a convolution under autocast."""
    *maps, height, width = make_inputs(height=9, width=3)
    assert_near([*(t.detach().bfloat16().requires_grad_() for t in maps), height, width], 0.05)


def test_transforms_of_torch_func():
    inputs = [t.detach() for t in make_inputs(n=2, heads=1)]

    def gradients_of(backend, *tensors: Tensor) -> tuple[Tensor, ...]:
        run = torch.func.grad(lambda *t: backend(*t).square().sum(), argnums=(0, 1, 2, 3, 4))
        return run(*tensors)

    def of_each(backend) -> tuple[Tensor, ...]:
        """Gradients for each sample, those of the tables too."""
        run = torch.func.vmap(
            lambda q, k, v, *tables: gradients_of(backend, q[None], k[None], v[None], *tables),
            in_dims=(0, 0, 0, None, None),
        )
        return run(*inputs)

    def of_tables(backend) -> list[Tensor]:
        widths = torch.stack([inputs[4], 2 * inputs[4]], 1)
        return [torch.func.vmap(lambda width: backend(*inputs[:4], width), in_dims=1)(widths)]

    def of_queries(backend) -> list[Tensor]:
        queries = torch.stack([inputs[0], 2 * inputs[0]])
        return [torch.func.vmap(lambda q: backend(q, *inputs[1:]))(queries)]

    found, expected = ([*gradients_of(run, *inputs), *of_each(run), *of_tables(run), *of_queries(run)] for run in BOTH)
    assert_same(found, expected, 1e-5)


def test_what_attention_cannot_do_it_says():
    inputs = make_inputs()
    first = torch.autograd.grad(triton_relative_attention(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; set backend"):
        torch.autograd.grad(sum(t.square().sum() for t in first), inputs)
    tensors = tuple(t.detach() for t in inputs)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative; set backend"):
        torch.func.jvp(triton_relative_attention, tensors, tensors)


def test_what_the_kernels_do_not_take_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match=r"not float64; set backend"):
        attention(*make_inputs(dtype=torch.float64), "triton")
    with pytest.raises(ValueError, match=r"at most 128 channels a head, not 129"):
        attention(*make_inputs(1, 1, 2, 2, d=129), "triton")
    with pytest.raises(ValueError, match=r"not on meta"):
        attention(*(t.detach().to("meta") for t in make_inputs()), "triton")
    monkeypatch.setattr(triton, "INSTALLED", False)
    with pytest.raises(ValueError, match="not installed"):
        attention(*make_inputs(), "triton")


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"run on CUDA, not on cpu"):
        attention(*(t.detach().cpu() for t in make_inputs()), "triton")


def test_the_operators_keep_torchs_rules():
    inputs = [t.detach().flatten(2, 3).transpose(2, 3) for t in make_inputs()[:3]]
    inputs = [t.requires_grad_() for t in (*inputs, *make_inputs()[3:])]
    torch.library.opcheck(torch.ops.augment_cli.triton_attention.default, tuple(inputs))
    results = torch.ops.augment_cli.triton_attention(*inputs)
    tensors = [t.detach() for t in (torch.ones_like(results[0]), *inputs, *results)]
    torch.library.opcheck(torch.ops.augment_cli.triton_attention_backward.default, tuple(tensors))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiling_breaks_no_graph(dynamic):
    inputs = make_inputs()
    compiled = torch.compile(triton_relative_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert_same(gradients(compiled, inputs), gradients(triton_relative_attention, inputs), 1e-6)


def test_a_layer_trains_compiled():
    split = {"heads": 2, "key_channels": 8, "value_channels": 4, "resolution": (5, 6)}
    layer, x = AAConv2d(6, 8, 3, padding=1, **split, device=DEVICE), torch.randn(2, 6, 5, 6, device=DEVICE)
    expected = torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])
    layer.backend = "triton"
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), [*layer.parameters()])
    assert_same(found, expected, 1e-4)


def test_memory_for_logits_is_never_taken():
    """The shapes of all that the passes allocate, on the meta device and by the sizes of the windows' sums."""
    from augment_cli.layers.triton.attention import _Call

    n, heads, d, e, size = 2, 8, 20, 4, 56
    maps = (torch.empty(n, heads, c, size * size, device="meta") for c in (d, d, e))
    tables = (torch.empty(2 * size - 1, d, device="meta") for _ in range(2))
    call = _Call(*maps, *tables)
    windows = (call.empty_windows("Q", call.tiles("K")[1], "X"), call.empty_windows("K", call.tiles("Q")[0], "Y"))
    logits = n * heads * size**4
    assert sum(t.numel() for t in windows) < logits / 10


@pytest.mark.skipif(DEVICE == "cpu", reason="the rule is for CUDA")
def test_the_rule_takes_the_kernels_on_cuda():
    q = make_inputs()[0]
    assert choose_backend(q, q) == choose_backend(q.bfloat16(), q.bfloat16()) == "triton"
    assert choose_backend(q.double(), q.double()) == "fused"


def test_the_rule_does_not_take_the_interpreter():
    q = make_inputs()[0].detach().cpu()
    assert choose_backend(q, q) != "triton"
