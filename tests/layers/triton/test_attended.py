"""The Triton kernels of AW compute what the formula says: on a GPU, or without one in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from augment_cli.layers import AWConv2d, triton
from augment_cli.layers.aw.attended import attended_conv, choose_backend
from augment_cli.layers.geometry import Geometry
from tests.layers import oracles
from tests.layers.aa.test_backends import gradients
from tests.layers.aw.test_backends import assert_same, results
from tests.layers.aw.test_conv import cases
from tests.layers.helpers import DEVICE, needs_triton, normal, randomised, seeds

pytestmark = needs_triton
drawn = settings(derandomize=True, deadline=None, max_examples=8)


def layer_of(*args, backend: str = "triton", seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> AWConv2d:
    layer = randomised(AWConv2d(*args, **options), seed).to(DEVICE, dtype)
    layer.backend = backend
    return layer


def input_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return normal(*shape, seed=1, dtype=dtype).to(DEVICE)


def assert_exact(layer: AWConv2d, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The result and all gradients are those of the grouped convolution in float64."""
    found = {name: t.double() for name, t in results(layer, x).items()}
    layer.backend = "grouped"
    assert_same(found, results(layer.double(), x.double()), tolerance)


@pytest.fixture(autouse=True)
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@given(cases(most_groups=1), st.integers(1, 9), seeds)
@drawn
def test_forward_equals_the_formula(case, reduction, seed):
    arguments, shape = case
    layer = layer_of(**arguments, reduction=reduction, seed=seed)
    options = {name: arguments[name] for name in ("stride", "padding", "dilation")}
    state = {name: t.double().cpu() for name, t in layer.state_dict().items()}
    expected = oracles.aw_conv(normal(*shape, seed=1), state, reduction=reduction, **options)
    assert (layer(input_of(*shape)).cpu() - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@given(cases(most_groups=1), st.integers(1, 9), seeds)
@drawn
def test_gradients_are_those_of_the_grouped_convolution(case, reduction, seed):
    arguments, shape = case
    assert_exact(layer_of(**arguments, reduction=reduction, seed=seed), input_of(*shape))


@pytest.mark.parametrize(("channels", "reduction"), [((72, 9), 8), ((96, 5), 96), ((18, 72), 3), ((34, 5), 1)], ids=str)
def test_several_blocks_of_channels(channels, reduction):
    assert_exact(layer_of(*channels, 3, padding=1, reduction=reduction), input_of(1, channels[0], 5, 4))


def test_several_blocks_of_positions():
    assert_exact(layer_of(4, 5, 3, padding=1, stride=(1, 2), reduction=2), input_of(2, 4, 13, 21))


def test_a_batch_in_parts_and_one_of_them_smaller(monkeypatch):
    from augment_cli.layers.triton import attended

    monkeypatch.setattr(attended, "PROGRAMS", 9 * 3)
    assert_exact(layer_of(4, 5, 3, padding=1, reduction=2), input_of(7, 4, 5, 6))


def test_padding_that_no_window_sees():
    assert_exact(layer_of(4, 4, 3, stride=8, padding=4, reduction=2), input_of(2, 4, 1, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)], ids=str)
def test_half_precision(dtype, tolerance):
    layer, x = layer_of(8, 6, 3, padding=1, reduction=2, dtype=dtype), input_of(2, 8, 4, 5, dtype=dtype)
    assert {t.dtype for t in results(layer, x).values()} == {dtype}
    assert_exact(layer, x, tolerance)


def test_autocast_rounds_what_a_convolution_rounds():
    layer, x = layer_of(8, 6, 3, padding=1, reduction=2), input_of(2, 8, 4, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = results(layer, x)
    assert found.pop("out").dtype == torch.bfloat16
    assert {t.dtype for t in found.values()} == {torch.float32}
    layer.backend = "grouped"
    assert_same(found, {name: t for name, t in results(layer, x).items() if name != "out"}, 0.03)


def test_channels_last_goes_in_and_comes_out():
    layer, x = layer_of(8, 6, 3, padding=1, reduction=2), input_of(3, 8, 5, 6)
    last = x.to(memory_format=torch.channels_last)
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    assert_same(results(layer, last), results(layer, x), 1e-6)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Without it, the gradient of torch's pool, which the attention starts from, is summed by atomics on CUDA."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_results_repeat_bit_for_bit():
    layer, x = layer_of(18, 33, 3, padding=1, reduction=9), input_of(2, 18, 5, 6)
    first, second = (results(layer, x) for _ in range(2))
    for name, t in first.items():
        assert torch.equal(t, second[name]), name


@pytest.mark.parametrize("frozen", ["input", "parameters", "kernel"])
def test_only_the_gradients_that_are_needed(frozen):
    layer, x = layer_of(4, 6, 2, reduction=2), input_of(2, 4, 4, 4)
    expected = results(layer, x)
    layer.requires_grad_(frozen != "parameters")
    layer.weight.requires_grad_(frozen == "input")
    x.requires_grad_(frozen != "input")
    out = layer(x)
    (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)).sum().backward()
    for name, tensor in {"x": x, **dict(layer.named_parameters())}.items():
        assert (tensor.grad is not None) == tensor.requires_grad
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, expected[name])


def test_no_samples():
    layer, x = layer_of(4, 3, 3, stride=2, reduction=2), torch.empty(0, 4, 5, 6, device=DEVICE)
    found = results(layer, x)
    assert found["out"].shape == (0, 3, 2, 2)
    assert not found["weight"].any()


def test_second_derivatives_and_transforms():
    layer, x = layer_of(4, 3, 3, padding=1, reduction=2), input_of(2, 4, 4, 3).requires_grad_()

    def run() -> list[torch.Tensor]:
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), x)
        return [*second, torch.func.vmap(layer)(torch.stack([x, x])), torch.func.jvp(layer, (x,), (x,))[1]]

    found = run()
    layer.backend = "grouped"
    for a, b in zip(found, run(), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_compiling_breaks_no_graph():
    layer, x = layer_of(6, 8, 3, padding=1, reduction=2), input_of(2, 6, 5, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(layer(x).square().sum(), [*layer.parameters()])
    found = torch.autograd.grad(compiled(x).square().sum(), [*layer.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


def test_the_operator_keeps_torchs_rules():
    from augment_cli.layers.aw.implicit import Triton

    layer, x = layer_of(4, 3, 3, padding=1, reduction=2), input_of(2, 4, 4, 3).requires_grad_()
    arranged = Triton.arranged(layer.weight, layer.expand.weight.view(-1, 3), layer.scales(x))
    tensors = x, *(t.detach().requires_grad_() for t in arranged)
    options = [3, 3], [1, 1], [1, 1], [1, 1], "triton"
    torch.library.opcheck(torch.ops.augment_cli.attended_conv.default, (*tensors, *options))


def test_tf32_is_as_convolutions_are_allowed_it(monkeypatch):
    from augment_cli.layers.triton import attended

    inputs = torch.zeros(1, 32, 4, 4), torch.zeros(32, 9, 2, 16), torch.zeros(32, 2), torch.zeros(1, 9, 2)
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    monkeypatch.setattr(attended, "is_interpreted", lambda: False)
    assert attended._Call(attended.kernels.conv_forward, inputs, geometry, 16).options["PRECISION"] == "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert attended._Call(attended.kernels.conv_forward, inputs, geometry, 16).options["PRECISION"] == "tf32"


def test_what_the_kernels_do_not_take_is_refused_with_the_reason(monkeypatch):
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1))
    tensors = [input_of(*shape) for shape in ((2, 4, 5, 5), (3, 4, 3, 3), (2, 3), (2, 2, 3, 3))]
    assert gradients(lambda *t: attended_conv(*t, geometry, "triton"), [t.requires_grad_() for t in tensors])
    with pytest.raises(ValueError, match="float64; use 'grouped'"):
        attended_conv(*(t.double() for t in tensors), geometry, "triton")
    with pytest.raises(ValueError, match="dense kernels only"):
        layer_of(4, 4, 3, groups=2)(input_of(1, 4, 5, 5))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"run on CUDA, not on cpu"):
        attended_conv(*(t.cpu() for t in tensors), geometry, "triton")
    monkeypatch.setattr(triton, "INSTALLED", False)
    with pytest.raises(ValueError, match="not installed"):
        attended_conv(*tensors, geometry, "triton")


def test_the_rule_does_not_take_the_interpreter():
    layer, x = layer_of(4, 3, 3, reduction=2).cpu(), input_of(2, 4, 5, 5).cpu()
    assert choose_backend(x, layer.weight, layer.geometry, 2) != "triton"
